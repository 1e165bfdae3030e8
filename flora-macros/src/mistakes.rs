//! Mistakes of the author: how they are worded and how independent ones are put together, so that one compilation reports
//! them all.

use proc_macro2::Span;
use quote::ToTokens;

/// A mistake at one token: what is wrong, and how to mend it.
pub(crate) fn at(span: Span, message: impl AsRef<str>, help: impl AsRef<str>) -> syn::Error {
    syn::Error::new(span, format!("{}\nhelp: {}", message.as_ref(), help.as_ref()))
}

/// A mistake that spans all of `tokens`.
pub(crate) fn over(tokens: impl ToTokens, message: impl AsRef<str>, help: impl AsRef<str>) -> syn::Error {
    syn::Error::new_spanned(tokens, format!("{}\nhelp: {}", message.as_ref(), help.as_ref()))
}

/// Both values, or the mistakes of both.
pub(crate) fn both<A, B>(a: syn::Result<A>, b: syn::Result<B>) -> syn::Result<(A, B)> {
    match (a, b) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(mut a), Err(b)) => {
            a.combine(b);
            Err(a)
        }
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
    }
}

/// All values, or the mistakes of all.
pub(crate) fn all<T>(results: impl IntoIterator<Item = syn::Result<T>>) -> syn::Result<Vec<T>> {
    let (mut values, mut outcome) = (Vec::new(), Ok(()));
    for result in results {
        outcome = both(outcome, result.map(|value| values.push(value))).map(drop);
    }
    outcome.map(|()| values)
}

/// `Ok` if there is no mistake.
pub(crate) fn none(mistakes: impl IntoIterator<Item = syn::Error>) -> syn::Result<()> {
    all(mistakes.into_iter().map(Err::<(), _>)).map(drop)
}

/// "; did you mean `near`?", if one of `known` is near to `written`.
pub(crate) fn suggestion<'a>(written: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    // Two slips in a name of six letters are a typing mistake; one in a name of a letter makes another name.
    let slips = match written.chars().count() {
        0 | 1 => 0,
        length => (length / 3).max(1),
    };
    let near = known.into_iter().map(|name| (strsim::damerau_levenshtein(written, name), name)).min();
    match near {
        Some((distance, name)) if distance <= slips => format!("; did you mean `{name}`?"),
        _ => String::new(),
    }
}

/// The names as prose: "`a`, `b`, `c`".
pub(crate) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
