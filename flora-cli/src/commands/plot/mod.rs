//! Charts as SVG, for the page of `flora report` and that of `flora train`. Every colour is one of [`COLOURS`], which a page's style
//! sheet may exchange for others on a dark screen; every series has a marker of its own too, for those who don't tell colours apart.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::element::{DashedPathElement, PathElement, Polygon, Text};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

mod scale;

pub(in crate::commands) use scale::Axis;

/// Pixels of a chart. It is shown at half of that or less, so that its whole-numbered coordinates are fine enough.
const SIZE: (u32, u32) = (720, 500);
const KEY_SIZE: (u32, u32) = (60, 28);
/// The height of text, in pixels; the backend divides by 1.24.
const TEXT: f64 = 26.0 * 1.24;

/// Axes, text and grid.
pub(in crate::commands) const INK: usize = 0;
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
pub(in crate::commands) const GREY: usize = 7;

/// How a series looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::commands) struct Look {
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
    pub(in crate::commands) fn of(number: usize) -> Self {
        const MARKS: [Mark; 5] = [Mark::Circle, Mark::Square, Mark::Triangle, Mark::Diamond, Mark::TriangleDown];
        Self { colour: 1 + number % 6, mark: MARKS[number % MARKS.len()], line: Line::Solid }
    }

    /// A line alone.
    pub(in crate::commands) fn line(colour: usize) -> Self {
        Self { colour, mark: Mark::None, line: Line::Solid }
    }

    pub(in crate::commands) fn dashed(self) -> Self {
        Self { line: Line::Dashed, ..self }
    }

    /// Marks alone.
    pub(in crate::commands) fn unjoined(self) -> Self {
        Self { line: Line::None, ..self }
    }

    /// Dots alone.
    pub(in crate::commands) fn dots(self) -> Self {
        Self { mark: Mark::Small, line: Line::None, ..self }
    }

    /// The line alone.
    pub(in crate::commands) fn unmarked(self) -> Self {
        Self { mark: Mark::None, line: Line::Solid, ..self }
    }

    fn stroke(self, width: u32) -> ShapeStyle {
        COLOURS[self.colour].stroke_width(width)
    }
}

/// Points with a look; each has the ends of its error bar, which may be at the point.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::commands) struct Series {
    pub(in crate::commands) look: Look,
    pub(in crate::commands) points: Vec<[f64; 2]>,
    /// x, and two y.
    pub(in crate::commands) bars: Vec<[f64; 3]>,
}

/// A chart of two axes.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::commands) struct Chart {
    pub(in crate::commands) x: Axis,
    pub(in crate::commands) y: Axis,
    pub(in crate::commands) series: Vec<Series>,
    /// Lines across the chart at these x.
    pub(in crate::commands) verticals: Vec<(f64, Look)>,
}

/// Bars with their labels.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::commands) struct Bars {
    pub(in crate::commands) x: &'static str,
    pub(in crate::commands) bars: Vec<(String, u64)>,
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
    pub(in crate::commands) fn svg(&self) -> String {
        svg(SIZE, |area| self.draw(area))
    }

    fn draw(&self, area: &Area<'_>) -> Drawn {
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
            .x_label_formatter(&|value| self.x.tick_label(*value))
            .y_label_formatter(&|value| self.y.tick_label(*value))
            .x_desc(self.x.label())
            .y_desc(self.y.label())
            .draw()?;
        let (left, top) = area.get_base_pixel();
        let pixel = |x: f64, y: f64| {
            let (right, down) = chart.backend_coord(&(x, y));
            (right - left, down - top)
        };
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
    }
}

/// Charts one below the other, under a legend.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "only training draws it"))]
pub(in crate::commands) struct Sheet {
    pub(in crate::commands) legend: Vec<(Look, String)>,
    /// Each with its title.
    pub(in crate::commands) charts: Vec<(&'static str, Chart)>,
}

impl Sheet {
    /// A file that needs nothing else.
    #[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "only training draws it"))]
    pub(in crate::commands) fn svg(&self) -> String {
        // Pixels, but for the columns of the legend.
        const WIDTH: u32 = 1080;
        const COLUMNS: u32 = 3;
        const ROW: u32 = 40;
        const TITLE: u32 = 56;
        const CHART: u32 = 420;
        let rows = (self.legend.len() as u32).div_ceil(COLUMNS);
        let size = (WIDTH, 20 + ROW * rows + (TITLE + CHART) * self.charts.len() as u32);
        svg(size, |area| {
            area.fill(&WHITE)?;
            let (legend, charts) = area.split_vertically(20 + ROW * rows);
            for (number, (look, label)) in self.legend.iter().enumerate() {
                let (column, row) = (number as u32 % COLUMNS, number as u32 / COLUMNS);
                let (x, y) = ((24 + column * (WIDTH / COLUMNS)) as i32, (20 + row * ROW + ROW / 2) as i32);
                draw_line(&legend, vec![(x, y), (x + 56, y)], *look, 4)?;
                draw_mark(&legend, (x + 28, y), *look)?;
                let label = label.chars().filter(|letter| !letter.is_control()).collect::<String>();
                legend.draw(&Text::new(label, (x + 68, y), text_style(Pos::new(HPos::Left, VPos::Center))))?;
            }
            for ((title, chart), area) in self.charts.iter().zip(charts.split_evenly((self.charts.len(), 1))) {
                let (above, below) = area.split_vertically(TITLE);
                let style = text_style(Pos::new(HPos::Left, VPos::Center));
                above.draw(&Text::new(*title, (24, TITLE as i32 / 2), style))?;
                chart.draw(&below)?;
            }
            Ok(())
        })
    }
}

/// A look as a legend shows it.
pub(in crate::commands) fn key(look: Look) -> String {
    svg(KEY_SIZE, |area| {
        let middle = (KEY_SIZE.0 as i32 / 2, KEY_SIZE.1 as i32 / 2);
        draw_line(area, vec![(2, middle.1), (KEY_SIZE.0 as i32 - 2, middle.1)], look, 4)?;
        draw_mark(area, middle, look)?;
        Ok(())
    })
}

impl Bars {
    pub(in crate::commands) fn svg(&self) -> String {
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
