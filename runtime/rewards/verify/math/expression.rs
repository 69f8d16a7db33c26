//! Mathematical expressions, and when two of them are equal.

use std::collections::BTreeSet;

use rehearsal_lm::random::Stream;

/// A parsed answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Expression {
    /// A number; `exact` unless it was written with a decimal point.
    Number {
        value: f64,
        exact: bool,
    },
    /// A variable, or a constant such as `\pi`.
    Symbol(String),
    /// Words that are no mathematics, in lower case.
    Text(String),
    Infinity,
    /// A number of hundredths.
    Percent(Box<Expression>),
    Negated(Box<Expression>),
    Sum(Vec<Expression>),
    Product(Vec<Expression>),
    Quotient(Box<Expression>, Box<Expression>),
    Power(Box<Expression>, Box<Expression>),
    /// A function by its name, such as `sqrt`, with its arguments.
    Function(String, Vec<Expression>),
    /// A pair, tuple or interval, with its brackets.
    Tuple(char, Vec<Expression>, char),
    Set(Vec<Expression>),
    /// Sets that are joined.
    Union(Vec<Expression>),
    /// Rows of a matrix or vector.
    Matrix(Vec<Vec<Expression>>),
    /// Two sides and the sign between them: `=`, `<`, `≤`, `≠`, `≈`, `∈`.
    Relation(Box<Expression>, char, Box<Expression>),
}

use Expression::*;

/// Points at which expressions with variables are compared.
const POINTS: u64 = 8;
/// Relative difference that rounding explains.
const ROUNDING: f64 = 1e-9;
/// Difference that a decimal number may have from the exact value it stands for.
const DECIMALS: f64 = 1e-6;

/// Whether two answers are the same. Expressions with variables are compared at random points.
pub fn equal(a: &Expression, b: &Expression) -> bool {
    if a == b {
        return true;
    }
    match (a, b) {
        (Percent(a), Percent(b)) => equal(a, b),
        // A percentage is written as 75 and as 0.75.
        (Percent(p), other) | (other, Percent(p)) => {
            let share = Quotient(p.clone(), Box::new(Number { value: 100.0, exact: true }));
            equal(p, other) || equal(&share, other)
        }
        // A value that was rounded after it was given.
        (Relation(given, '≈', rounded), other) | (other, Relation(given, '≈', rounded)) => {
            equal(if matches!(**given, Symbol(_)) { rounded } else { given }, other)
        }
        // What a variable is in.
        (Relation(_, '∈', set), Relation(_, '∈', other)) => equal(set, other),
        (Relation(_, '∈', set), other) | (other, Relation(_, '∈', set)) => equal(set, other),
        (Relation(..), Relation(..)) => same_relation(a, b),
        // `x = 75` answers with 75.
        (Relation(left, '=', right), other) | (other, Relation(left, '=', right))
            if matches!(**left, Symbol(_) | Relation(..) | Function(..)) =>
        {
            equal(right, other)
        }
        (Relation(..), Tuple(..)) => interval(a).is_some_and(|a| equal(&a, b)),
        (Tuple(..), Relation(..)) => interval(b).is_some_and(|b| equal(a, &b)),
        (Relation(..), _) | (_, Relation(..)) => false,
        (Set(a), Set(b)) | (Union(a), Union(b)) => same_items(a, b),
        (Tuple(open, a, close), Tuple(other_open, b, other_close)) => {
            (open, close) == (other_open, other_close) && pairwise(a, b)
        }
        (Matrix(a), Matrix(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| pairwise(a, b)),
        (Symbol(name), Text(text)) | (Text(text), Symbol(name)) => name.to_lowercase() == *text,
        (Set(_) | Union(_) | Tuple(..) | Matrix(_) | Text(_), _) => false,
        (_, Set(_) | Union(_) | Tuple(..) | Matrix(_) | Text(_)) => false,
        (a, b) => same_value(a, b),
    }
}

/// Whether two equations or inequalities have the same sides, say the same of their variables, or give a variable the same value.
fn same_relation(a: &Expression, b: &Expression) -> bool {
    let (Relation(left, sign, right), Relation(other_left, other, other_right)) = (a, b) else { return false };
    if sign == other && equal(left, other_left) && equal(right, other_right) {
        return true;
    }
    if (*sign, *other) == ('=', '=')
        && let (Some(name), Some(other_name)) = (a.defined(), b.defined())
    {
        return name == other_name && equal(right, other_right);
    }
    if let (Some(a), Some(b)) = (interval(a), interval(b)) {
        return equal(&a, &b);
    }
    match factor(&difference(left, right), &difference(other_left, other_right)) {
        Some(factor) if factor > 0.0 || matches!(sign, '=' | '≠') => sign == other,
        Some(_) => flipped(*sign) == *other,
        None => false,
    }
}

fn difference(left: &Expression, right: &Expression) -> Expression {
    Sum(vec![left.clone(), Negated(Box::new(right.clone()))])
}

/// What one expression is times the other, if that is the same at every point.
fn factor(a: &Expression, b: &Expression) -> Option<f64> {
    let mut found: Option<f64> = None;
    for point in 0..POINTS {
        let at = |name: &str| value_of(name, point);
        let ratio = a.value(&at)? / b.value(&at)?;
        let same = found.is_none_or(|found| (found - ratio).abs() <= 1e-7 * found.abs());
        if !ratio.is_finite() || ratio == 0.0 || !same {
            return None;
        }
        found = Some(ratio);
    }
    found
}

/// The interval of `a ≤ x < b`.
fn interval(e: &Expression) -> Option<Expression> {
    let Relation(first, second, high) = e else { return None };
    let Relation(low, first_sign, variable) = &**first else { return None };
    let bracket = |sign: char, closed: char, open: char| match sign {
        '≤' => Some(closed),
        '<' => Some(open),
        _ => None,
    };
    let (open, close) = (bracket(*first_sign, '[', '(')?, bracket(*second, ']', ')')?);
    matches!(**variable, Symbol(_)).then(|| Tuple(open, vec![(**low).clone(), (**high).clone()], close))
}

fn flipped(sign: char) -> char {
    match sign {
        '<' => '>',
        '>' => '<',
        '≤' => '≥',
        '≥' => '≤',
        other => other,
    }
}

fn pairwise(a: &[Expression], b: &[Expression]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b))
}

/// Whether the items are equal in some order.
fn same_items(a: &[Expression], b: &[Expression]) -> bool {
    let mut left: Vec<&Expression> = b.iter().collect();
    let found = |a: &Expression| left.iter().position(|b| equal(a, b)).map(|at| left.swap_remove(at)).is_some();
    a.len() == b.len() && a.iter().all(found)
}

fn same_value(a: &Expression, b: &Expression) -> bool {
    let mut variables = BTreeSet::new();
    a.variables(&mut variables);
    b.variables(&mut variables);
    let tolerance = if a.is_exact() && b.is_exact() { 0.0 } else { DECIMALS };
    let points = if variables.is_empty() { 1 } else { POINTS };
    let mut compared = 0;
    for point in 0..points {
        let at = |name: &str| value_of(name, point);
        match (a.value(&at), b.value(&at)) {
            (Some(a), Some(b)) if a.is_nan() && b.is_nan() => {} // outside of both domains
            (Some(a), Some(b)) => {
                let near = (a - b).abs() <= tolerance + ROUNDING * a.abs().max(b.abs());
                if a != b && !(near && a.is_finite() && b.is_finite()) {
                    return false;
                }
                compared += 1;
            }
            _ => return false,
        }
    }
    compared > 0
}

/// A variable's value at a point.
fn value_of(name: &str, point: u64) -> f64 {
    let seed = name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    0.3 + 2.4 * Stream::new(seed, point).uniform(0)
}

impl Expression {
    /// The variable that a chain of equations begins with.
    fn defined(&self) -> Option<&str> {
        match self {
            Relation(left, '=', _) => match &**left {
                Symbol(name) => Some(name),
                other => other.defined(),
            },
            _ => None,
        }
    }

    fn parts(&self) -> Vec<&Expression> {
        match self {
            Number { .. } | Symbol(_) | Text(_) | Infinity => Vec::new(),
            Percent(a) | Negated(a) => vec![a],
            Quotient(a, b) | Power(a, b) | Relation(a, _, b) => vec![a, b],
            Sum(all) | Product(all) | Function(_, all) | Tuple(_, all, _) | Set(all) | Union(all) => {
                all.iter().collect()
            }
            Matrix(rows) => rows.iter().flatten().collect(),
        }
    }

    fn variables(&self, into: &mut BTreeSet<String>) {
        if let Symbol(name) = self
            && constant(name).is_none()
        {
            into.insert(name.clone());
        }
        self.parts().into_iter().for_each(|part| part.variables(into));
    }

    /// Whether no number in it was written with a decimal point.
    fn is_exact(&self) -> bool {
        !matches!(self, Number { exact: false, .. }) && self.parts().into_iter().all(Expression::is_exact)
    }

    /// Its value; `None` if it is no number.
    fn value(&self, at: &dyn Fn(&str) -> f64) -> Option<f64> {
        Some(match self {
            Number { value, .. } => *value,
            Symbol(name) => constant(name).unwrap_or_else(|| at(name)),
            Infinity => f64::INFINITY,
            Percent(a) => a.value(at)? / 100.0,
            Negated(a) => -a.value(at)?,
            Sum(all) => all.iter().map(|a| a.value(at)).sum::<Option<f64>>()?,
            Product(all) => all.iter().map(|a| a.value(at)).product::<Option<f64>>()?,
            Quotient(a, b) => a.value(at)? / b.value(at)?,
            Power(a, b) => a.value(at)?.powf(b.value(at)?),
            Function(name, arguments) => {
                let values: Option<Vec<f64>> = arguments.iter().map(|a| a.value(at)).collect();
                function(name, &values?)?
            }
            Text(_) | Tuple(..) | Set(_) | Union(_) | Matrix(_) | Relation(..) => return None,
        })
    }
}

fn constant(name: &str) -> Option<f64> {
    match name {
        "pi" => Some(std::f64::consts::PI),
        "e" => Some(std::f64::consts::E),
        _ => None,
    }
}

fn function(name: &str, x: &[f64]) -> Option<f64> {
    Some(match (name, x) {
        ("sqrt", [x]) => x.sqrt(),
        ("root", [n, x]) => x.signum() * x.abs().powf(1.0 / n),
        ("abs", [x]) => x.abs(),
        ("log", [x]) | ("lg", [x]) => x.log10(),
        ("ln", [x]) => x.ln(),
        ("logarithm", [base, x]) => x.ln() / base.ln(),
        ("exp", [x]) => x.exp(),
        ("sin", [x]) => x.sin(),
        ("cos", [x]) => x.cos(),
        ("tan", [x]) => x.tan(),
        ("cot", [x]) => 1.0 / x.tan(),
        ("sec", [x]) => 1.0 / x.cos(),
        ("csc", [x]) => 1.0 / x.sin(),
        ("arcsin", [x]) => x.asin(),
        ("arccos", [x]) => x.acos(),
        ("arctan", [x]) => x.atan(),
        ("floor", [x]) => x.floor(),
        ("ceil", [x]) => x.ceil(),
        ("binomial", [n, k]) => factorial(*n)? / (factorial(*k)? * factorial(n - k)?),
        ("factorial", [n]) => factorial(*n)?,
        _ => return None,
    })
}

/// `n!` of a whole number up to 170, the largest that a float holds.
fn factorial(n: f64) -> Option<f64> {
    let whole = (0.0..=170.0).contains(&n) && n.fract() == 0.0;
    whole.then(|| (1..=n as u32).map(f64::from).product())
}
