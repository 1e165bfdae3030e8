//! The parser of the text form: recursive descent, bounded in size and depth, so that no text makes it panic, hang or overflow.

use std::collections::HashMap;

use logos::Logos;

use super::lexer::Token;
use super::{ELEMENTS, ROLES, backward_function, binary_function, unary_function};
use crate::arena::Handle;
use crate::diagnostic::Diagnostic;
use crate::layer::{Layer, Node, Operand, Operator, Reduce, Role, Span};
use crate::types::{Dimension, ElementType, Scope, Shape, TensorType};
use crate::verify::{MAX_NODES, MAX_OPERANDS, is_identifier};

/// The longest source.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;

/// The deepest nesting of parentheses and calls.
pub const MAX_DEPTH: usize = 100;

/// Why a text is not a layer: the first mistake, where it is, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} ({})", .diagnostic.message, .diagnostic.help)]
pub struct ParseError {
    /// The mistake; [`Diagnostic::render`] shows it in the source.
    pub diagnostic: Diagnostic,
}

impl ParseError {
    /// The bytes of the source that are wrong.
    pub fn span(&self) -> Span {
        self.diagnostic.span
    }
}

fn error<T>(span: Span, message: impl Into<String>, help: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError { diagnostic: Diagnostic::new(span, message, help) })
}

/// The layer that `source` writes. It is not verified; each mention of an operand is a node of its own, each mention of a
/// `let` is the same node.
///
/// # Errors
/// The first mistake in the source.
pub fn parse(source: &str) -> Result<Layer, ParseError> {
    let mut parser = Parser::new(source)?;
    parser.layer()?;
    Ok(parser.layer)
}

/// An expression whose names are all taken for adapters, whatever their shape: one side of a rewrite rule.
pub(crate) fn parse_pattern(source: &str) -> Result<Layer, ParseError> {
    let mut parser = Parser { free_names: true, ..Parser::new(source)? };
    parser.layer.root = Some(parser.expression()?);
    parser.end()?;
    Ok(parser.layer)
}

struct Parser<'s> {
    source: &'s str,
    tokens: Vec<(Token, Span)>,
    next: usize,
    depth: usize,
    layer: Layer,
    names: HashMap<&'s str, Meaning>,
    free_names: bool,
}

#[derive(Clone, Copy)]
enum Meaning {
    Operand(Handle<Operand>),
    Binding(Handle<Node>),
}

impl<'s> Parser<'s> {
    fn new(source: &'s str) -> Result<Self, ParseError> {
        if source.len() > MAX_SOURCE_BYTES {
            return error(
                Span::default(),
                format!("the source has {} bytes", source.len()),
                format!("a layer is at most {MAX_SOURCE_BYTES} bytes long"),
            );
        }
        let mut tokens = Vec::new();
        for (token, range) in Token::lexer(source).spanned() {
            let span = Span { start: range.start as u32, end: range.end as u32 };
            match token {
                Ok(token) => tokens.push((token, span)),
                Err(()) => {
                    let text = &source[range];
                    return error(span, format!("`{text}` means nothing here"), "remove it");
                }
            }
        }
        let (layer, names) = (Layer::new(""), HashMap::new());
        Ok(Self { source, tokens, next: 0, depth: 0, layer, names, free_names: false })
    }

    fn peek(&self) -> Option<Token> {
        self.tokens.get(self.next).map(|(token, _)| *token)
    }

    /// The span of the next word, or the end of the source.
    fn here(&self) -> Span {
        let end = self.source.len() as u32;
        self.tokens.get(self.next).map_or(Span { start: end, end }, |(_, span)| *span)
    }

    fn text(&self, span: Span) -> &'s str {
        self.source.get(span.start as usize..span.end as usize).unwrap_or("")
    }

    fn accept(&mut self, token: Token) -> bool {
        let accepted = self.peek() == Some(token);
        self.next += usize::from(accepted);
        accepted
    }

    fn expect(&mut self, token: Token, what: &str) -> Result<Span, ParseError> {
        let span = self.here();
        if self.accept(token) {
            return Ok(span);
        }
        let found = match self.peek() {
            Some(_) => format!("`{}`", self.text(span)),
            None => "the end".to_owned(),
        };
        error(span, format!("expected {what}, found {found}"), format!("write {what} here"))
    }

    fn end(&mut self) -> Result<(), ParseError> {
        match self.peek() {
            None => Ok(()),
            Some(_) => {
                let span = self.here();
                error(
                    span,
                    format!("unexpected `{}`", self.text(span)),
                    "a source holds one layer and nothing after it",
                )
            }
        }
    }

    fn layer(&mut self) -> Result<(), ParseError> {
        self.expect(Token::Layer, "`layer`")?;
        let name = self.expect(Token::Name, "the layer's name")?;
        self.layer.name = self.text(name).to_owned();
        self.expect(Token::Open, "`(`")?;
        while self.peek() != Some(Token::Close) {
            self.operand()?;
            if !self.accept(Token::Comma) {
                break;
            }
        }
        self.expect(Token::Close, "`,` or `)`")?;
        self.expect(Token::OpenBrace, "`{`")?;
        while self.accept(Token::Let) {
            let name = self.expect(Token::Name, "a name")?;
            self.expect(Token::Equals, "`=`")?;
            let value = self.expression()?;
            self.expect(Token::Semicolon, "`;` or an operator")?;
            self.name(name, Meaning::Binding(value))?;
        }
        self.layer.root = Some(self.expression()?);
        self.expect(Token::CloseBrace, "`}` or an operator")?;
        self.end()
    }

    /// Gives `name` a meaning, once.
    fn name(&mut self, name: Span, meaning: Meaning) -> Result<(), ParseError> {
        let text = self.text(name);
        if !is_identifier(text) {
            return error(name, format!("`{text}` can't be a name"), "use at most 64 letters, digits and underscores");
        }
        match self.names.insert(text, meaning) {
            None => Ok(()),
            Some(_) => error(name, format!("`{text}` is already defined"), "choose another name"),
        }
    }

    fn operand(&mut self) -> Result<(), ParseError> {
        let name = self.expect(Token::Name, "an operand's name")?;
        self.expect(Token::Colon, "`:`")?;
        let role_span = self.expect(Token::Name, "a role (input, weight, bias, adapter, sparse or residual)")?;
        let role_text = self.text(role_span);
        let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == role_text) else {
            let help = "write input, weight, bias, adapter, sparse or residual";
            return error(role_span, format!("`{role_text}` is not a role"), help);
        };
        let shape = self.shape()?;
        let element = if self.accept(Token::Colon) { self.element()? } else { ElementType::F32 };
        if self.layer.operands.len() >= MAX_OPERANDS {
            return error(name, "the layer has too many operands", format!("use at most {MAX_OPERANDS}"));
        }
        let ty = TensorType { shape, rank_axis: None, element, scope: role.scope() };
        let operand = self.layer.declare(Operand { name: self.text(name).to_owned(), role: *role, ty }, name);
        self.name(name, Meaning::Operand(operand))
    }

    fn shape(&mut self) -> Result<Shape, ParseError> {
        let open = self.expect(Token::OpenBracket, "`[`")?;
        let mut dimensions = Vec::new();
        while self.peek() != Some(Token::CloseBracket) && dimensions.len() < 3 {
            dimensions.push(self.dimension()?);
            if !self.accept(Token::Comma) {
                break;
            }
        }
        let mut dimensions = dimensions.into_iter();
        let shape = match (dimensions.next(), dimensions.next(), dimensions.next()) {
            (None, ..) => Shape::Scalar,
            (Some(n), None, _) => Shape::Vector(n),
            (Some(m), Some(n), None) => Shape::Matrix(m, n),
            (_, _, Some(_)) => return error(open, "a tensor has at most two dimensions", "flatten the leading ones"),
        };
        self.expect(Token::CloseBracket, "`,` or `]`")?;
        Ok(shape)
    }

    fn dimension(&mut self) -> Result<Dimension, ParseError> {
        let span = self.here();
        let text = self.text(span);
        if self.accept(Token::Number) {
            return match text.parse() {
                Ok(extent) if extent > 0 => Ok(Dimension::Fixed(extent)),
                _ => error(span, format!("`{text}` is not an extent"), "write a positive whole number"),
            };
        }
        self.expect(Token::Name, "a dimension")?;
        Ok(if text == "tokens" { Dimension::Tokens } else { Dimension::Symbol(text.to_owned()) })
    }

    fn element(&mut self) -> Result<ElementType, ParseError> {
        let span = self.expect(Token::Name, "an element type")?;
        let text = self.text(span);
        match ELEMENTS.iter().find(|element| element.name() == text) {
            Some(element) => Ok(*element),
            None => error(span, format!("`{text}` is not an element type"), "write f32, f16 or bf16"),
        }
    }

    fn push(&mut self, node: Node, span: Span) -> Result<Handle<Node>, ParseError> {
        if self.layer.nodes.len() >= MAX_NODES {
            return error(span, "the equation is too long", format!("write it in at most {MAX_NODES} operations"));
        }
        Ok(self.layer.push(node, span))
    }

    /// The span from the start of `first` to the word before the next one.
    fn since(&self, first: Span) -> Span {
        let last = self.next.checked_sub(1).and_then(|index| self.tokens.get(index));
        Span { start: first.start, end: last.map_or(first.end, |(_, span)| span.end) }
    }

    /// Products joined by `+`.
    fn expression(&mut self) -> Result<Handle<Node>, ParseError> {
        self.depth += 1;
        let first = self.here();
        if self.depth > MAX_DEPTH {
            return error(first, "the equation is nested too deeply", "name the inner part with `let`");
        }
        let mut lhs = self.product()?;
        loop {
            if self.peek() == Some(Token::Minus) {
                return error(self.here(), "there is no subtraction", "add the value times -1.0");
            }
            if !self.accept(Token::Plus) {
                break;
            }
            let rhs = self.product()?;
            lhs = self.push(Node::Elementwise { operator: Operator::Add, lhs, rhs }, self.since(first))?;
        }
        self.depth -= 1;
        Ok(lhs)
    }

    /// Factors joined by `@`, `*` and `/`, from the left.
    fn product(&mut self) -> Result<Handle<Node>, ParseError> {
        let first = self.here();
        let mut lhs = self.factor()?;
        loop {
            let combine: fn(Handle<Node>, Handle<Node>) -> Node = match self.peek() {
                Some(Token::At) => |lhs, rhs| Node::MatMul { lhs, rhs, reduce: Reduce::Sum },
                Some(Token::Star) => |lhs, rhs| Node::Elementwise { operator: Operator::Multiply, lhs, rhs },
                Some(Token::Slash) => |lhs, rhs| Node::Elementwise { operator: Operator::Divide, lhs, rhs },
                _ => return Ok(lhs),
            };
            self.next += 1;
            let rhs = self.factor()?;
            lhs = self.push(combine(lhs, rhs), self.since(first))?;
        }
    }

    fn factor(&mut self) -> Result<Handle<Node>, ParseError> {
        let span = self.here();
        if self.accept(Token::Open) {
            let value = self.expression()?;
            self.expect(Token::Close, "`)` or an operator")?;
            return Ok(value);
        }
        let negative = self.accept(Token::Minus);
        if negative || self.peek() == Some(Token::Number) {
            let digits = self.expect(Token::Number, "a number")?;
            let span = self.since(span);
            return match self.text(digits).parse::<f64>() {
                Ok(number) if number.is_finite() => {
                    self.push(Node::Constant(if negative { -number } else { number }), span)
                }
                _ => error(span, "the number is too large", "write a number that an f64 can hold"),
            };
        }
        let name = self.expect(Token::Name, "an operand, a number or `(`")?;
        if self.accept(Token::Open) { self.call(name) } else { self.mention(name) }
    }

    fn mention(&mut self, span: Span) -> Result<Handle<Node>, ParseError> {
        let text = self.text(span);
        match self.names.get(text) {
            Some(Meaning::Operand(operand)) => self.push(Node::Operand(*operand), span),
            Some(Meaning::Binding(node)) => Ok(*node),
            None if self.free_names => {
                let scalar = Shape::Scalar;
                let ty =
                    TensorType { shape: scalar, rank_axis: None, element: ElementType::F32, scope: Scope::PerSegment };
                let operand = self.layer.declare(Operand { name: text.to_owned(), role: Role::Adapter, ty }, span);
                self.names.insert(text, Meaning::Operand(operand));
                self.push(Node::Operand(operand), span)
            }
            None => {
                let mut known: Vec<_> = self.names.keys().map(|name| format!("`{name}`")).collect();
                known.sort();
                error(span, format!("`{text}` is not defined"), format!("defined here are {}", known.join(", ")))
            }
        }
    }

    /// The arguments and the closing parenthesis of a call.
    fn call(&mut self, name: Span) -> Result<Handle<Node>, ParseError> {
        let text = self.text(name);
        let node = if let Some(function) = unary_function(text) {
            function(self.expression()?)
        } else if let Some(function) = binary_function(text) {
            let lhs = self.expression()?;
            self.expect(Token::Comma, "`,`")?;
            function(lhs, self.expression()?)
        } else if self.free_names {
            let value = self.expression()?;
            let like = if self.accept(Token::Comma) { Some(self.expression()?) } else { None };
            match backward_function(text, value, like) {
                Some(backward) => Node::Backward(backward),
                None => return error(name, format!("there is no function `{text}`"), "see the functions of a layer"),
            }
        } else {
            let help = "the functions are columns, rows, sum_rank, mean_rank, column_norm, transpose, matmul_mean, \
                        face_splitting, khatri_rao, identity, relu, gelu_erf, gelu_tanh and silu";
            return error(name, format!("there is no function `{text}`"), help);
        };
        self.expect(Token::Close, "`)`")?;
        self.push(node, self.since(name))
    }
}
