//! Refuses templates that could nest containers without bound.
//!
//! Comparing, joining and freeing a value recurse into it, and cost as many steps as it has paths:
//! `{% set a = [a, a] %}` forty times over is 2^40 of them, and a namespace that holds itself has no end
//! at all. The library's fuel does not see these steps. So the depth of everything that a template can
//! build is estimated from above, whatever the order of execution. What has no bound is refused, and so
//! is comparing or joining what is nested. Templates that collect things in lists, build messages, or
//! print values are not affected: printing (python.rs) pays for each step.

use std::collections::HashMap;

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Macro, Stmt};
use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;

use crate::Result;

const MAX_DEPTH: u32 = 12;

/// A filter or method whose result is a list of pairs or of lists of what it was given.
const NESTING: [&str; 6] = ["items", "dictsort", "groupby", "batch", "slice", "zip"];

/// Filters that read all of what they are given, at no cost in fuel for its inner parts.
const READING: [&str; 17] = [
    "string", "join", "upper", "lower", "title", "capitalize", "trim", "replace", "escape", "e",
    "format", "indent", "urlencode", "pprint", "split", "lines", "safe",
];
/// The same, unless they go by an attribute.
const COMPARING: [&str; 4] = ["sort", "unique", "min", "max"];

/// What a value may be: how many containers made by the template lie around the input's own data, and
/// whether a namespace is in it.
#[derive(Clone, Copy, Default, PartialEq)]
struct Shape {
    depth: u32,
    has_namespace: bool,
}

impl Shape {
    fn join(self, other: Self) -> Self {
        Self {
            depth: self.depth.max(other.depth),
            has_namespace: self.has_namespace || other.has_namespace,
        }
    }
    fn inside(self, levels: u32) -> Self {
        Self { depth: self.depth + levels, ..self }
    }
    fn element(self) -> Self {
        Self { depth: self.depth.saturating_sub(1), has_namespace: self.has_namespace && self.depth > 0 }
    }
}

#[derive(Default)]
struct Shapes<'a> {
    variables: HashMap<&'a str, Shape>,
    attributes: HashMap<&'a str, Shape>, // of any namespace; never one that holds a namespace
    macros: HashMap<&'a str, Vec<&'a str>>, // their parameters
    changed: bool,
    error: Option<String>,
}

pub fn check(source: &str, syntax: SyntaxConfig) -> Result<()> {
    let Ok(template) = parse(source, "", syntax) else {
        return Ok(()); // compiling will say what is wrong
    };
    let mut shapes = Shapes::default();
    loop {
        shapes.changed = false;
        shapes.statement(&template);
        if let Some(error) = shapes.error {
            return Err(error);
        }
        if !shapes.changed {
            return Ok(());
        }
    }
}

impl<'a> Shapes<'a> {
    fn grow(&mut self, is_attribute: bool, name: &'a str, shape: Shape) {
        let known = if is_attribute { &mut self.attributes } else { &mut self.variables };
        let known = known.entry(name).or_default();
        let joined = known.join(shape);
        self.changed |= joined != *known;
        *known = joined;
        if joined.depth > MAX_DEPTH {
            self.error = Some(format!("`{name}` may be nested without bound"));
        } else if is_attribute && joined.has_namespace {
            self.error = Some(format!("`{name}` puts a namespace into a namespace"));
        }
    }

    fn assign(&mut self, target: &Expr<'a>, shape: Shape) {
        match target {
            Expr::Var(var) => self.grow(false, var.id, shape),
            Expr::GetAttr(attr) => self.grow(true, attr.name, shape),
            Expr::List(list) => list.items.iter().for_each(|item| self.assign(item, shape.element())),
            Expr::Tuple(tuple) => tuple.items.iter().for_each(|item| self.assign(item, shape.element())),
            _ => {}
        }
    }

    /// `what` reads all of a value of this shape.
    fn read(&mut self, what: &str, shape: Shape) {
        if shape.depth > 1 || shape.has_namespace {
            self.error = Some(format!("{what} of nested containers"));
        }
    }

    fn block(&mut self, statements: &[Stmt<'a>]) {
        statements.iter().for_each(|statement| self.statement(statement));
    }

    fn statement(&mut self, statement: &Stmt<'a>) {
        match statement {
            Stmt::Template(s) => self.block(&s.children),
            Stmt::EmitExpr(s) => {
                self.expr(&s.expr);
            }
            Stmt::ForLoop(s) => {
                let mut shape = self.expr(&s.iter);
                if s.recursive {
                    shape = shape.join(self.variables.get("loop").copied().unwrap_or_default());
                }
                self.assign(&s.target, shape.element());
                s.filter_expr.iter().for_each(|e| {
                    self.expr(e);
                });
                self.block(&s.body);
                self.block(&s.else_body);
            }
            Stmt::IfCond(s) => {
                self.expr(&s.expr);
                self.block(&s.true_body);
                self.block(&s.false_body);
            }
            Stmt::WithBlock(s) => {
                for (target, expr) in &s.assignments {
                    let shape = self.expr(expr);
                    self.assign(target, shape);
                }
                self.block(&s.body);
            }
            Stmt::Set(s) => {
                let shape = self.expr(&s.expr);
                self.assign(&s.target, shape);
            }
            Stmt::SetBlock(s) => self.block(&s.body), // captures text
            Stmt::AutoEscape(s) => self.block(&s.body),
            Stmt::FilterBlock(s) => self.block(&s.body),
            Stmt::Block(s) => self.block(&s.body),
            Stmt::Macro(s) => self.declare(s),
            Stmt::CallBlock(s) => {
                self.call(&s.call.expr, &s.call.args);
                self.declare(&s.macro_decl);
            }
            Stmt::Do(s) => {
                self.call(&s.call.expr, &s.call.args);
            }
            _ => {}
        }
    }

    fn declare(&mut self, declared: &Macro<'a>) {
        let names = declared.args.iter().filter_map(|arg| match arg {
            Expr::Var(var) => Some(var.id),
            _ => None,
        });
        self.macros.insert(declared.name, names.collect());
        let first = declared.args.len() - declared.defaults.len();
        for (arg, default) in declared.args[first..].iter().zip(&declared.defaults) {
            let shape = self.expr(default);
            self.assign(arg, shape);
        }
        self.block(&declared.body);
    }

    fn all<'e>(&mut self, exprs: impl IntoIterator<Item = &'e Expr<'a>>) -> Shape
    where
        'a: 'e,
    {
        exprs.into_iter().fold(Shape::default(), |shape, expr| shape.join(self.expr(expr)))
    }

    /// A scalar is compared with, or looked for in, a container's first level only.
    fn compare<'e>(&mut self, operands: impl IntoIterator<Item = &'e Expr<'a>>) -> Shape
    where
        'a: 'e,
    {
        let (mut num_containers, mut shape) = (0, Shape::default());
        for operand in operands {
            let operand = self.expr(operand);
            num_containers += u32::from(operand != Shape::default());
            shape = shape.join(operand);
        }
        if num_containers > 1 {
            self.read("a comparison", shape);
        }
        Shape::default()
    }

    fn args(&mut self, args: &[CallArg<'a>]) -> Shape {
        self.all(args.iter().map(|arg| match arg {
            CallArg::Pos(e) | CallArg::Kwarg(_, e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => e,
        }))
    }

    fn call(&mut self, callee: &Expr<'a>, args: &[CallArg<'a>]) -> Shape {
        let given = self.args(args);
        match callee {
            Expr::Var(var) if var.id == "namespace" => {
                for arg in args {
                    match arg {
                        CallArg::Kwarg(name, e) => {
                            let shape = self.expr(e);
                            self.grow(true, name, shape);
                        }
                        // Attributes of any name: those a plain dictionary has.
                        CallArg::Pos(e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => {
                            let shape = self.expr(e);
                            if shape.depth > 1 || shape.has_namespace {
                                self.error = Some("namespace() of nested values".into());
                            }
                        }
                    }
                }
                Shape { depth: 0, has_namespace: true }
            }
            Expr::Var(var) if var.id == "dict" => {
                let nested = args.iter().any(|arg| matches!(arg, CallArg::Kwarg(..)));
                // Copies of dictionaries are as deep as they are; named values lie one level deeper.
                let named = self.all(args.iter().filter_map(|arg| match arg {
                    CallArg::Kwarg(_, e) => Some(e),
                    _ => None,
                }));
                let copied = self.all(args.iter().filter_map(|arg| match arg {
                    CallArg::Pos(e) | CallArg::PosSplat(e) | CallArg::KwargSplat(e) => Some(e),
                    CallArg::Kwarg(..) => None,
                }));
                if nested { copied.join(named.inside(1)) } else { copied }
            }
            Expr::Var(var) => {
                if var.id == "loop" {
                    self.grow(false, "loop", given);
                }
                for name in self.macros.get(var.id).cloned().unwrap_or_default() {
                    self.grow(false, name, given);
                }
                given
            }
            Expr::GetAttr(method) => {
                let levels = if NESTING.contains(&method.name) { 2 } else { 0 };
                self.expr(&method.expr).join(given).inside(levels)
            }
            other => self.expr(other).join(given),
        }
    }

    fn expr(&mut self, expr: &Expr<'a>) -> Shape {
        match expr {
            Expr::Var(e) => self.variables.get(e.id).copied().unwrap_or_default(),
            Expr::Const(_) => Shape::default(),
            Expr::Slice(e) => {
                self.all([&e.start, &e.stop, &e.step].into_iter().flatten());
                self.expr(&e.expr)
            }
            Expr::UnaryOp(e) => self.expr(&e.expr),
            Expr::BinOp(e) => {
                use BinOpKind::{Concat, Eq, Gt, Gte, In, Lt, Lte, Ne};
                match e.op {
                    Eq | Ne | Lt | Lte | Gt | Gte | In => self.compare([&e.left, &e.right]),
                    Concat => {
                        let shape = self.all([&e.left, &e.right]);
                        self.read("`~`", shape);
                        Shape::default()
                    }
                    _ => self.all([&e.left, &e.right]),
                }
            }
            Expr::Compare(e) => {
                self.compare(std::iter::once(&e.expr).chain(e.ops.iter().map(|op| &op.expr)))
            }
            Expr::IfExpr(e) => {
                self.expr(&e.test_expr);
                self.all(std::iter::once(&e.true_expr).chain(&e.false_expr))
            }
            Expr::Filter(e) => {
                let levels = if NESTING.contains(&e.name) { 2 } else { 0 };
                let args = self.args(&e.args);
                let shape = self.all(&e.expr).join(args);
                let by_attribute = e.args.iter().any(|arg| matches!(arg, CallArg::Kwarg("attribute", _)));
                if READING.contains(&e.name) || (COMPARING.contains(&e.name) && !by_attribute) {
                    self.read(e.name, shape);
                }
                shape.inside(levels)
            }
            Expr::Test(e) => {
                self.expr(&e.expr);
                self.args(&e.args);
                Shape::default()
            }
            Expr::GetAttr(e) => {
                let attribute = self.attributes.get(e.name).copied().unwrap_or_default();
                self.expr(&e.expr).element().join(attribute)
            }
            Expr::GetItem(e) => {
                self.expr(&e.subscript_expr);
                let container = self.expr(&e.expr);
                let shape = container.element();
                match container.has_namespace {
                    true => self.attributes.values().fold(shape, |shape, a| shape.join(*a)),
                    false => shape,
                }
            }
            Expr::Call(e) => self.call(&e.expr, &e.args),
            Expr::List(e) => self.all(&e.items).inside(1),
            Expr::Tuple(e) => self.all(&e.items).inside(1),
            Expr::Map(e) => self.all(e.keys.iter().chain(&e.values)).inside(1),
        }
    }
}
