//! Lists of tensor names in messages.

/// Joins names to "`a` is" or "`a` and 2 more are".
pub(super) fn join_names(names: &[&str]) -> String {
    match names {
        [] => "nothing is".into(),
        [name] => format!("`{name}` is"),
        [name, more @ ..] => format!("`{name}` and {} more are", more.len()),
    }
}

/// Joins names to "`a` is" or "`a`, `b`, `c` are", so that a user can take each of them from the model.
pub(super) fn join_all_names(names: &[&str]) -> String {
    let verb = if names.len() == 1 { "is" } else { "are" };
    format!("`{}` {verb}", names.join("`, `"))
}
