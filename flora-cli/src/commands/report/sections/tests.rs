use askama::Template;

use super::*;
use crate::commands::report::document::Table;
use crate::commands::report::page::{Format, KernelPoints, Model, Point};

/// A kernel measured over a lattice; `seconds` by rows, rank, adapters.
fn lattice(name: &str, seconds: impl Fn(u64, u64, u64) -> f64) -> KernelPoints {
    let mut points = Vec::new();
    for rows in [1, 16, 256] {
        for rank in [1, 8] {
            for adapters in [1, 32] {
                points.push(Point {
                    rows,
                    rank: Some(rank),
                    adapters: Some(adapters),
                    extent: 2048,
                    seconds_per_mac: seconds(rows, rank, adapters),
                    macs_per_byte: rows as f64 / 4.0,
                    spread: 0.04,
                });
            }
        }
    }
    KernelPoints { name: name.to_owned(), multiplies_weight: true, points }
}

fn model(kernels: Vec<KernelPoints>) -> Model {
    Model {
        device: "a device".to_owned(),
        flora: "0.0.0".to_owned(),
        seconds_per_launch: 1e-7,
        launch_spread: 0.02,
        bytes_per_second: 2e10,
        bandwidth_spread: 0.05,
        formats: vec![Format { name: "f32/f32/f32".to_owned(), kernels, error: None }],
    }
}

fn tables(section: &Section) -> Vec<&Table> {
    let tables = section.blocks.iter().filter_map(|block| match block {
        Block::Table(table) | Block::Folded { table, .. } => Some(table),
        _ => None,
    });
    tables.collect()
}

#[test]
fn a_lattice_is_summed_up_and_listed() {
    let fast = lattice("segmented", |rows, rank, adapters| (adapters + rank) as f64 * 1e-11 / rows as f64);
    let page = Page { model: Some(model(vec![fast])), ..Page::default() };
    let document = document(&page);
    let [coefficients, roofline, ..] = &document.sections[..] else { panic!("four sections") };
    let [summary, points] = &tables(coefficients)[..] else { panic!("two tables") };
    // Fastest: 256 rows, rank 1, an adapter; slowest: a row, rank 8, 32 adapters.
    assert_eq!(summary.rows, [["segmented", "12", "1 to 256", "0.078", "400", "4.0 %"]]);
    assert_eq!(points.rows.len(), 12);
    assert_eq!(points.rows[3], ["segmented", "1", "8", "32", "2048", "400", "2.5", "0.25", "4.0 %"]);
    // Memory allows 64 MACs a byte at 2e10 bytes a second: this kernel is above the slope.
    let [roof] = &tables(roofline)[..] else { panic!("one table") };
    assert_eq!(roof.rows, [["segmented", "12800.0", "64.00", "1000 %"]]);
}

#[test]
fn what_no_device_has_is_drawn_without_a_panic() {
    let odd = [0.0, f64::MIN_POSITIVE, f64::MAX, f64::INFINITY, f64::NAN, -1.0];
    for seconds in odd {
        for bytes_per_second in odd {
            let mut kernels = vec![lattice("<i>", |_, _, _| seconds), lattice("bmm", |rows, _, _| rows as f64)];
            kernels.push(KernelPoints { name: "none".to_owned(), multiplies_weight: false, points: Vec::new() });
            let page = Page { model: Some(Model { bytes_per_second, ..model(kernels) }), ..Page::default() };
            let html = document(&page).render().expect("the template renders");
            assert!(!html.contains("<i>") && html.contains("i&#62;"));
        }
    }
}

#[test]
fn an_empty_page_says_how_to_fill_it() {
    let html = document(&Page::default()).render().expect("the template renders");
    for command in ["flora tune", "flora bench paper", "flora bench planner", "flora report --planner"] {
        assert!(html.contains(command), "{command}");
    }
}

#[test]
fn shares_have_as_many_digits_as_they_need() {
    assert_eq!([0.0, 0.00049, 0.0312, 0.25, 1.0].map(percent), ["0 %", "< 0.1 %", "3.1 %", "25 %", "100 %"]);
}
