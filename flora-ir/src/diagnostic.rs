//! A mistake in a layer: where it is, what is wrong, and how to mend it. Spans are kept beside the graph and become text only
//! here, at the edge.

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource, Report};

use crate::layer::Span;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// The stretch of the source that is wrong.
    pub span: Span,
    /// What is wrong.
    pub message: String,
    /// How to mend it.
    pub help: String,
    /// Other stretches that explain the mistake.
    pub labels: Vec<Label>,
}

/// A remark on a stretch of the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The stretch.
    pub span: Span,
    /// The remark.
    pub message: String,
}

impl Diagnostic {
    /// A mistake without further labels.
    pub fn new(span: Span, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { span, message: message.into(), help: help.into(), labels: Vec::new() }
    }

    /// Adds a remark on another stretch.
    pub fn label(mut self, span: Span, message: impl Into<String>) -> Self {
        self.labels.push(Label { span, message: message.into() });
        self
    }

    /// The mistake as text without colours: message, the lines of `source` with the stretches underlined, and the mend.
    /// `name` is shown as the source's name. Spans that lie outside `source` are clipped to it.
    pub fn render(&self, name: &str, source: &str) -> String {
        let mut out = String::new();
        let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor()).with_width(120);
        match handler.render_report(&mut out, self.report(name, source).as_ref()) {
            Ok(()) => out,
            Err(_) => format!("{}\nhelp: {}\n", self.message, self.help),
        }
    }

    /// The mistake as a [`miette::Report`], for a program that renders its own errors with miette.
    pub fn report(&self, name: &str, source: &str) -> Report {
        let stretch = |span: Span| {
            let clip = |at: u32| {
                let mut at = (at as usize).min(source.len());
                while !source.is_char_boundary(at) {
                    at -= 1;
                }
                at
            };
            let (start, end) = (clip(span.start), clip(span.end));
            start..end.max(start)
        };
        let first = LabeledSpan::new_primary_with_span(Some("here".to_owned()), stretch(self.span));
        let others = self.labels.iter().map(|label| LabeledSpan::at(stretch(label.span), label.message.clone()));
        let diagnostic = MietteDiagnostic::new(&self.message)
            .with_help(&self.help)
            .with_labels(std::iter::once(first).chain(others));
        Report::new(diagnostic).with_source_code(NamedSource::new(name, source.to_owned()))
    }
}
