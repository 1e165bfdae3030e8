//! A page as sections of blocks, and its HTML. The template escapes all text; only charts are markup already.

use askama::Template;

use crate::commands::plot::{self, Look};

/// The page.
#[derive(Template)]
#[template(path = "report.html")]
pub(super) struct Document {
    pub(super) title: String,
    pub(super) subtitle: String,
    pub(super) sections: Vec<Section>,
    pub(super) footer: String,
}

/// A part with a heading.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Section {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) blocks: Vec<Block>,
}

/// What a section is made of.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Block {
    Heading(String),
    Paragraph(String),
    /// In place of what wasn't given: a sentence, and the commands that make it.
    Missing {
        sentence: &'static str,
        commands: Vec<String>,
    },
    /// Figures of one kind, with what their marks mean.
    Figures {
        keys: Vec<Key>,
        figures: Vec<Figure>,
    },
    Tiles(Vec<Tile>),
    Table(Table),
    /// A table that is shown when it is asked for.
    Folded {
        summary: String,
        table: Table,
    },
}

/// A number to be seen first.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tile {
    pub(super) value: String,
    pub(super) label: &'static str,
}

/// An entry of a legend.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    svg: String,
    label: String,
}

impl Key {
    pub(super) fn new(look: Look, label: impl Into<String>) -> Self {
        Self { svg: plot::key(look), label: label.into() }
    }
}

/// A chart with words.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Figure {
    pub(super) title: String,
    pub(super) svg: String,
    pub(super) caption: String,
}

/// Cells in rows; columns `<…` are aligned left and `>…` right, as in the tables of the command line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Table {
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(|column| (*column).to_owned()).collect(), rows: Vec::new() }
    }

    /// The columns' names.
    fn heads(&self) -> impl Iterator<Item = Cell<'_>> {
        self.columns.iter().map(|column| Cell { text: column.trim_start_matches(['<', '>']), class: class(column) })
    }

    /// The cells of a row.
    fn cells<'a>(&'a self, row: &'a [String]) -> impl Iterator<Item = Cell<'a>> {
        row.iter().zip(&self.columns).map(|(text, column)| Cell { text, class: class(column) })
    }
}

/// The class of a column's cells.
fn class(column: &str) -> &'static str {
    if column.starts_with('>') { "number" } else { "word" }
}

struct Cell<'a> {
    text: &'a str,
    class: &'static str,
}
