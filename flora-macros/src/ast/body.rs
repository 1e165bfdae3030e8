//! Reads the body: `let` bindings, then the output.

use flora_ir::{Activation, Operator, Pairs, Reduce};
use proc_macro2::Span;
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{BinOp, Block, Expr, ExprMethodCall, Lit, Local, Stmt, UnOp};

use super::signature::{identifiers, name};
use super::{Expression, ExpressionKind, Unary};
use crate::mistakes::{all, at, both, listed, none, over, suggestion};

/// The deepest expression: the passes that read it recurse.
const MAX_DEPTH: usize = 128;

/// What a method of the equation's language does.
#[derive(Clone, Copy)]
enum Method {
    MatMul(Reduce),
    PairProduct(Pairs),
    Unary(Unary),
}

const METHODS: [(&str, Method); 14] = [
    ("matmul", Method::MatMul(Reduce::Sum)),
    ("matmul_mean", Method::MatMul(Reduce::Mean)),
    ("columns", Method::Unary(Unary::Columns)),
    ("rows", Method::Unary(Unary::Rows)),
    ("sum_rank", Method::Unary(Unary::ReduceRank(Reduce::Sum))),
    ("mean_rank", Method::Unary(Unary::ReduceRank(Reduce::Mean))),
    ("column_norm", Method::Unary(Unary::ColumnNorm)),
    ("transpose", Method::Unary(Unary::Transpose)),
    ("face_splitting", Method::PairProduct(Pairs::Columns)),
    ("khatri_rao", Method::PairProduct(Pairs::Rows)),
    ("relu", Method::Unary(Unary::Activation(Activation::Relu))),
    ("gelu", Method::Unary(Unary::Activation(Activation::GeluErf))),
    ("gelu_tanh", Method::Unary(Unary::Activation(Activation::GeluTanh))),
    ("silu", Method::Unary(Unary::Activation(Activation::Silu))),
];

const LANGUAGE: &str =
    "an equation has operands, numbers, `+ - * /`, parentheses and method calls such as `x.matmul(w0)`";

/// The bindings and the output of `block`, in which `parameters` are known, each name with its parameter's position.
pub(super) fn read(
    block: &Block,
    parameters: impl Iterator<Item = (String, usize)>,
) -> syn::Result<(Vec<Expression>, Expression)> {
    let mut scope = Scope::new(parameters);
    let (earlier, last) = match block.stmts.split_last() {
        Some((Stmt::Expr(result, semicolon), earlier)) => (earlier, Ok((result, *semicolon))),
        Some((last, _)) => {
            let help = "end the body with the output's expression";
            (block.stmts.as_slice(), Err(over(last, "the body ends without an output", help)))
        }
        None => {
            let braces = block.brace_token.span.join();
            (&[][..], Err(at(braces, "the body is empty", "write the equation, such as `x.matmul(w0)`")))
        }
    };
    let bindings = all(earlier.iter().map(|statement| scope.statement(statement)));
    let result = last.and_then(|(result, semicolon)| {
        let lost = semicolon.map(|token| at(token.span, "the output is lost", "remove the `;`"));
        both(scope.expression(result), none(lost)).map(|(result, ())| result)
    });
    let read = both(bindings, result)?;
    // After other mistakes "never used" would be noise: the use may be what couldn't be read.
    none(scope.unused())?;
    Ok(read)
}

/// The names that an expression may use, each with what it stands for; a later one hides an earlier one.
struct Scope {
    names: Vec<(String, Reference)>,
    bindings: Vec<Binding>,
    /// How deep in an expression the reader is.
    depth: usize,
}

#[derive(Clone, Copy)]
enum Reference {
    Parameter(usize),
    Binding(usize),
}

struct Binding {
    span: Span,
    used: bool,
}

impl Scope {
    fn new(parameters: impl Iterator<Item = (String, usize)>) -> Self {
        let names = parameters.map(|(name, position)| (name, Reference::Parameter(position)));
        Self { names: names.collect(), bindings: Vec::new(), depth: 0 }
    }

    fn statement(&mut self, statement: &Stmt) -> syn::Result<Expression> {
        match statement {
            Stmt::Local(local) => self.binding(local),
            Stmt::Expr(value, _) => {
                Err(over(value, "the value of this statement is lost", "bind it by `let`, or remove it"))
            }
            other => Err(over(other, "an item or a macro is no part of an equation", LANGUAGE)),
        }
    }

    fn binding(&mut self, local: &Local) -> syn::Result<Expression> {
        let (pattern, annotation) = match &local.pat {
            syn::Pat::Type(typed) => (&*typed.pat, Some(&typed.ty)),
            other => (other, None),
        };
        let annotation = annotation
            .map(|ty| over(ty, "a binding has no type of its own", "remove it: types follow from the operands"));
        let attributes =
            local.attrs.iter().map(|attribute| over(attribute, "a binding has no attributes", "remove it"));
        let value = match &local.init {
            None => Err(at(local.let_token.span, "this binding has no value", "write `let name = value;`")),
            Some(init) => match &init.diverge {
                Some((token, _)) => Err(at(token.span, "an equation has no branches", "remove the `else`")),
                None => self.expression(&init.expr),
            },
        };
        let name = name(pattern);
        // What a refused pattern names is known all the same: its uses aren't mistakes too.
        for name in identifiers(pattern.to_token_stream()) {
            self.names.push((name, Reference::Binding(self.bindings.len())));
        }
        self.bindings.push(Binding { span: pattern.span(), used: false });
        let checks = none(annotation.into_iter().chain(attributes));
        both(both(name, checks), value).map(|(_, value)| value)
    }

    fn unused(&self) -> impl Iterator<Item = syn::Error> {
        let unused = self.bindings.iter().filter(|binding| !binding.used);
        unused.map(|binding| at(binding.span, "this binding is never used", "use it in the equation, or remove it"))
    }

    fn expression(&mut self, expression: &Expr) -> syn::Result<Expression> {
        if self.depth == MAX_DEPTH {
            let message = format!("this expression is nested more than {MAX_DEPTH} deep");
            return Err(over(expression, message, "name parts of it by `let`"));
        }
        self.depth += 1;
        let read = self.unguarded(expression);
        self.depth -= 1;
        read
    }

    fn unguarded(&mut self, expression: &Expr) -> syn::Result<Expression> {
        match expression {
            Expr::Paren(inner) => self.expression(&inner.expr),
            Expr::Group(inner) => self.expression(&inner.expr),
            Expr::Path(path) if path.qself.is_none() => match path.path.get_ident() {
                Some(ident) => self.reference(ident),
                None => Err(over(path, "an operand is a plain name", LANGUAGE)),
            },
            Expr::Lit(literal) => number(&literal.lit),
            Expr::Binary(binary) => {
                let (lhs, rhs) = both(self.expression(&binary.left), self.expression(&binary.right))?;
                elementwise(&binary.op, lhs, rhs)
            }
            Expr::Unary(unary) => match unary.op {
                UnOp::Neg(minus) => Ok(negated(self.expression(&unary.expr)?, minus.span)),
                other => Err(over(other, "this operator is no part of an equation", LANGUAGE)),
            },
            Expr::MethodCall(call) => self.method(call),
            Expr::Call(call) => Err(match &*call.func {
                Expr::Path(path) if path.path.get_ident().is_some_and(|name| method(&name.to_string()).is_some()) => {
                    over(&call.func, "an equation has no function calls", "write it as a method of its first operand")
                }
                other => over(other, "an equation has no function calls", LANGUAGE),
            }),
            Expr::Reference(reference) => Err(at(
                reference.and_token.span,
                "an equation has no references",
                "remove the `&`: operands are values",
            )),
            Expr::Return(value) => Err(at(
                value.return_token.span,
                "an equation has no `return`",
                "write the output as the last expression, without `;`",
            )),
            other => Err(over(other, "this is no part of an equation", LANGUAGE)),
        }
    }

    fn reference(&mut self, ident: &syn::Ident) -> syn::Result<Expression> {
        let name = ident.unraw().to_string();
        let kind = match self.names.iter().rev().find(|(known, _)| *known == name) {
            Some(&(_, Reference::Parameter(position))) => ExpressionKind::Parameter(position),
            Some(&(_, Reference::Binding(position))) => {
                self.bindings[position].used = true;
                ExpressionKind::Binding(position)
            }
            None => {
                let known = || self.names.iter().map(|(name, _)| name.as_str());
                let message = format!("`{name}` is neither an operand nor a binding{}", suggestion(&name, known()));
                return Err(at(ident.span(), message, format!("known here: {}", listed(known()))));
            }
        };
        Ok(Expression { kind, span: ident.span() })
    }

    fn method(&mut self, call: &ExprMethodCall) -> syn::Result<Expression> {
        let receiver = self.expression(&call.receiver);
        let arguments = all(call.args.iter().map(|argument| self.expression(argument)));
        let (receiver, (arguments, method)) = both(receiver, both(arguments, called(call)))?;
        let span = call.method.span();
        let mut arguments = arguments.into_iter();
        let kind = match (method, arguments.next(), arguments.next()) {
            (Method::MatMul(reduce), Some(rhs), None) => {
                ExpressionKind::MatMul(reduce, Box::new(receiver), Box::new(rhs))
            }
            (Method::PairProduct(pairs), Some(rhs), None) => {
                ExpressionKind::PairProduct(pairs, Box::new(receiver), Box::new(rhs))
            }
            (Method::Unary(function), None, None) => ExpressionKind::Unary(function, Box::new(receiver)),
            (Method::MatMul(_), ..) => {
                let message = format!("`{}` takes one argument, the right-hand side", call.method);
                return Err(at(span, message, "write `x.matmul(w0)` for x @ w0"));
            }
            (Method::PairProduct(_), ..) => {
                let message = format!("`{}` takes one argument, the other matrix", call.method);
                return Err(at(span, message, "write `b.face_splitting(d)`"));
            }
            (Method::Unary(_), ..) => {
                let message = format!("`{}` takes no argument", call.method);
                return Err(at(span, message, format!("write `.{}()`", call.method)));
            }
        };
        Ok(Expression { kind, span })
    }
}

fn method(name: &str) -> Option<Method> {
    METHODS.iter().find(|(known, _)| *known == name).map(|&(_, method)| method)
}

/// The method that a call names.
fn called(call: &ExprMethodCall) -> syn::Result<Method> {
    let name = call.method.to_string();
    let names = || METHODS.iter().map(|&(name, _)| name);
    let method = method(&name).ok_or_else(|| {
        let message = format!("there is no operation `{name}`{}", suggestion(&name, names()));
        at(call.method.span(), message, format!("the operations are {}", listed(names())))
    });
    let turbofish =
        call.turbofish.as_ref().map(|turbofish| over(turbofish, "an operation has no generics", "remove them"));
    both(method, none(turbofish)).map(|(method, ())| method)
}

fn number(literal: &Lit) -> syn::Result<Expression> {
    let (suffix, value) = match literal {
        Lit::Int(integer) => (integer.suffix(), integer.base10_digits().parse::<f64>()),
        Lit::Float(float) => (float.suffix(), float.base10_digits().parse::<f64>()),
        other => return Err(over(other, "this literal is no number", "write a number such as `2` or `0.5`")),
    };
    match value {
        Ok(value) if value.is_finite() && suffix.is_empty() => {
            Ok(Expression { kind: ExpressionKind::Number(value), span: literal.span() })
        }
        Ok(value) if value.is_finite() => Err(over(
            literal,
            "a number has no type suffix",
            format!("remove `{suffix}`: element types belong to operands"),
        )),
        _ => Err(over(literal, "this number is beyond the range of f64", "write a finite number")),
    }
}

fn elementwise(operator: &BinOp, lhs: Expression, rhs: Expression) -> syn::Result<Expression> {
    let (operator, span, rhs) = match operator {
        BinOp::Add(token) => (Operator::Add, token.span, rhs),
        BinOp::Mul(token) => (Operator::Multiply, token.span, rhs),
        BinOp::Div(token) => (Operator::Divide, token.span, rhs),
        BinOp::Sub(token) => (Operator::Add, token.span, negated(rhs, token.span)),
        other => return Err(over(other, "this operator is no part of an equation", LANGUAGE)),
    };
    Ok(Expression { kind: ExpressionKind::Elementwise(operator, Box::new(lhs), Box::new(rhs)), span })
}

/// `-value`: the IR has no subtraction, so a minus is a product with -1.
fn negated(value: Expression, span: Span) -> Expression {
    let kind = match value.kind {
        ExpressionKind::Number(number) => ExpressionKind::Number(-number),
        kind => {
            let one = Expression { kind: ExpressionKind::Number(-1.0), span };
            ExpressionKind::Elementwise(
                Operator::Multiply,
                Box::new(one),
                Box::new(Expression { kind, span: value.span }),
            )
        }
    };
    Expression { kind, span }
}
