//! Charts as SVG. Every colour is one of [`COLOURS`], which the page's style sheet exchanges for others on a dark screen; every
//! series has a marker of its own too, for those who don't tell colours apart.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::element::{DashedPathElement, PathElement, Polygon, Text};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::scale::{Axis, tick_label};

/// Pixels of a chart. It is shown at half of that or less, so that its whole-numbered coordinates are fine enough.
const SIZE: (u32, u32) = (720, 500);
const KEY_SIZE: (u32, u32) = (60, 28);
/// The height of text, in pixels; the backend divides by 1.24.
const TEXT: f64 = 26.0 * 1.24;

/// Axes, text and grid.
pub(super) const INK: usize = 0;
/// The colours of series, which people who don't see all of them tell apart (Okabe and Ito's, without the yellow).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(128, 128, 128),
];
/// The base GEMM's.
pub(super) const GREY: usize = 7;

/// How a series looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    colour: usize,
    mark: Mark,
    line: Line,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    None,
    Circle,
    Square,
    Triangle,
    Diamond,
    TriangleDown,
    Small,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    None,
    Solid,
    Dashed,
}

impl Look {
    /// The look of the series of this number: marks and a line.
    pub(super) fn of(number: usize) -> Self {
        const MARKS: [Mark; 5] = [Mark::Circle, Mark::Square, Mark::Triangle, Mark::Diamond, Mark::TriangleDown];
        Self { colour: 1 + number % 6, mark: MARKS[number % MARKS.len()], line: Line::Solid }
    }

    /// A line alone.
    pub(super) fn line(colour: usize) -> Self {
        Self { colour, mark: Mark::None, line: Line::Solid }
    }

    pub(super) fn dashed(self) -> Self {
        Self { line: Line::Dashed, ..self }
    }

    /// Marks alone.
    pub(super) fn unjoined(self) -> Self {
        Self { line: Line::None, ..self }
    }

    /// Dots alone.
    pub(super) fn dots(self) -> Self {
        Self { mark: Mark::Small, line: Line::None, ..self }
    }

    /// The line alone.
    pub(super) fn unmarked(self) -> Self {
        Self { mark: Mark::None, line: Line::Solid, ..self }
    }

    fn stroke(self, width: u32) -> ShapeStyle {
        COLOURS[self.colour].stroke_width(width)
    }
}

/// Points with a look; each has the ends of its error bar, which may be at the point.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series {
    pub(super) look: Look,
    pub(super) points: Vec<[f64; 2]>,
    /// x, and two y.
    pub(super) bars: Vec<[f64; 3]>,
}

/// A chart of two axes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chart {
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
    /// Lines across the chart at these x.
    pub(super) verticals: Vec<(f64, Look)>,
}

/// Bars with their labels.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bars {
    pub(super) x: &'static str,
    pub(super) bars: Vec<(String, u64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// The SVG that `draw` draws. Nothing that draws into a string fails; if it did, the figure would be without what it failed at.
fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let _ = draw(&area);
        let _ = area.present();
    }
    text
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let (from, to) = (f64::from(limit.0), f64::from(limit.1));
        (from + self.place(*value) * (to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Of grid lines, those at the ticks are enough.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low()..self.high()
    }
}

fn text_style(position: Pos) -> TextStyle<'static> {
    ("sans-serif", TEXT).into_font().color(&COLOURS[INK]).pos(position)
}

impl Chart {
    pub(super) fn svg(&self) -> String {
        svg(SIZE, |area| {
            let mut chart = ChartBuilder::on(area)
                .margin_top(14)
                .margin_right(26)
                .x_label_area_size(76)
                .y_label_area_size(112)
                .build_cartesian_2d(self.x.clone(), self.y.clone())?;
            let label = text_style(Pos::new(HPos::Center, VPos::Center));
            chart
                .configure_mesh()
                .bold_line_style(COLOURS[INK].mix(0.15).stroke_width(2))
                .light_line_style(TRANSPARENT)
                .axis_style(COLOURS[INK].mix(0.6).stroke_width(2))
                .label_style(label.clone())
                .axis_desc_style(label)
                .x_label_formatter(&|value| tick_label(*value))
                .y_label_formatter(&|value| tick_label(*value))
                .x_desc(self.x.label())
                .y_desc(self.y.label())
                .draw()?;
            let pixel = |x: f64, y: f64| chart.backend_coord(&(x, y));
            for (x, look) in self.verticals.iter().filter(|(x, _)| self.x.holds(*x)) {
                draw_line(area, vec![pixel(*x, self.y.low()), pixel(*x, self.y.high())], *look, 3)?;
            }
            for Series { look, points, bars } in &self.series {
                for [x, low, high] in bars {
                    draw_line(area, vec![pixel(*x, *low), pixel(*x, *high)], look.unmarked(), 2)?;
                }
                let pixels: Vec<_> = points.iter().map(|[x, y]| pixel(*x, *y)).collect();
                if pixels.len() > 1 {
                    draw_line(area, pixels.clone(), *look, 4)?;
                }
                pixels.into_iter().try_for_each(|pixel| draw_mark(area, pixel, *look))?;
            }
            Ok(())
        })
    }
}

/// A look as a legend shows it.
pub(super) fn key(look: Look) -> String {
    svg(KEY_SIZE, |area| {
        let middle = (KEY_SIZE.0 as i32 / 2, KEY_SIZE.1 as i32 / 2);
        draw_line(area, vec![(2, middle.1), (KEY_SIZE.0 as i32 - 2, middle.1)], look, 4)?;
        draw_mark(area, middle, look)?;
        Ok(())
    })
}

impl Bars {
    pub(super) fn svg(&self) -> String {
        svg(SIZE, |area| {
            let most = self.bars.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
            let (left, right, top, bottom) = (20, SIZE.0 as i32 - 20, 50, SIZE.1 as i32 - 90);
            let step = (right - left) / self.bars.len().max(1) as i32;
            let above = text_style(Pos::new(HPos::Center, VPos::Bottom));
            let below = text_style(Pos::new(HPos::Center, VPos::Top));
            for (position, (label, count)) in self.bars.iter().enumerate() {
                let from = left + step * position as i32;
                let height = (f64::from(bottom - top) * *count as f64 / most as f64).round() as i32;
                let corners = [(from + 6, bottom - height), (from + step - 6, bottom)];
                area.draw(&Rectangle::new(corners, COLOURS[1].filled()))?;
                let middle = from + step / 2;
                area.draw(&Text::new(count.to_string(), (middle, bottom - height - 4), above.clone()))?;
                area.draw(&Text::new(label.clone(), (middle, bottom + 10), below.clone()))?;
            }
            area.draw(&PathElement::new([(left, bottom), (right, bottom)], COLOURS[INK].mix(0.6).stroke_width(2)))?;
            let middle = SIZE.0 as i32 / 2;
            area.draw(&Text::new(self.x, (middle, SIZE.1 as i32 - 40), below))?;
            Ok(())
        })
    }
}

/// Draws a line through these pixels.
fn draw_line(area: &Area<'_>, pixels: Vec<(i32, i32)>, look: Look, width: u32) -> Drawn {
    let style = look.stroke(width);
    match look.line {
        Line::None => {}
        Line::Solid => area.draw(&PathElement::new(pixels, style))?,
        Line::Dashed => area.draw(&DashedPathElement::new(pixels, 12, 8, style))?,
    }
    Ok(())
}

/// Draws a marker around this pixel.
fn draw_mark(area: &Area<'_>, (x, y): (i32, i32), look: Look) -> Drawn {
    let style = COLOURS[look.colour].filled();
    let corners: &[(i32, i32)] = match look.mark {
        Mark::None => return Ok(()),
        Mark::Small => return Ok(area.draw(&Circle::new((x, y), 5, COLOURS[look.colour].mix(0.6).filled()))?),
        Mark::Circle => return Ok(area.draw(&Circle::new((x, y), 8, style))?),
        Mark::Square => &[(-7, -7), (7, -7), (7, 7), (-7, 7)],
        Mark::Triangle => &[(0, -10), (10, 8), (-10, 8)],
        Mark::TriangleDown => &[(0, 10), (10, -8), (-10, -8)],
        Mark::Diamond => &[(0, -11), (11, 0), (0, 11), (-11, 0)],
    };
    let corners: Vec<_> = corners.iter().map(|(right, down)| (x + right, y + down)).collect();
    Ok(area.draw(&Polygon::new(corners, style))?)
}
