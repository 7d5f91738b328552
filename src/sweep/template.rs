//! Shell commands with a placeholder for a path.

/// Placeholder that is replaced by the quoted path.
const PLACEHOLDER: &str = "{}";

/// Placeholder that is replaced by the quoted path of the second run's average.
pub(super) const SECOND: &str = "{with}";

/// Environment variable of the command that holds the path.
pub(super) const WEIGHTS: &str = "POSTHOC_EMA_WEIGHTS";

/// Environment variable of the command that holds the path of the second run's average.
pub(super) const WITH: &str = "POSTHOC_EMA_WITH";

/// Shell command with `{}` where the path goes.
#[derive(Clone, Debug)]
pub(super) struct Template(String);

impl Template {
    /// Checks a command.
    ///
    /// # Errors
    /// Returns the reason if the command does not use the path, or if `{}` is inside quotes. The check looks at the
    /// quote characters around `{}`. It does not parse the shell's language, and refuses some commands that would work.
    pub(super) fn new(command: &str) -> Result<Template, String> {
        if !command.contains(PLACEHOLDER) && !command.contains(WEIGHTS) {
            return Err(format!("`{command}` names no file: write {{}} where the path of the weights goes"));
        }
        let places = |name| command.match_indices(name);
        let mut places = places(PLACEHOLDER).chain(places(SECOND));
        let is_torn =
            |(start, name): &(usize, &str)| may_be_inside_quotes(&command[..*start], &command[start + name.len()..]);
        if let Some((_, name)) = places.find(is_torn) {
            return Err(format!(
                "`{command}` has {name} inside quotes or a here-document, where the quoted path would be torn apart: \
                 use \"${variable}\" there, or remove the quotes, as the path is quoted anyway",
                variable = if name == SECOND { WITH } else { WEIGHTS }
            ));
        }
        Ok(Template(command.to_owned()))
    }

    /// Returns true if the command uses the path of the second run's average.
    pub(super) fn has_second(&self) -> bool {
        self.0.contains(SECOND) || self.0.contains(WITH)
    }

    /// Returns the command with a quoted path in place of each `{}`, that of the second run's average in place of each
    /// `{with}`, and a number in place of each name.
    pub(super) fn fill(&self, path: &[u8], second: Option<&[u8]>, numbers: &[(&str, u32)]) -> Vec<u8> {
        let replace = |text: String, (name, number): &(&str, u32)| text.replace(name, &number.to_string());
        let text = numbers.iter().fold(self.0.clone(), replace);
        let path = quote(path);
        let fill = |piece: &str| -> Vec<u8> {
            let pieces: Vec<&[u8]> = piece.split(PLACEHOLDER).map(str::as_bytes).collect();
            pieces.join(path.as_slice())
        };
        match second {
            // Split first: a path may hold the other placeholder.
            Some(second) => text.split(SECOND).map(fill).collect::<Vec<_>>().join(quote(second).as_slice()),
            None => fill(&text),
        }
    }
}

/// Returns true if a place in a command may be inside quotes or a here-document.
///
/// In `"$(cat "{}")"`, where quotes are nested, an even number of them is before the place. Two equal quotes right
/// around it are therefore refused, too.
fn may_be_inside_quotes(before: &str, after: &str) -> bool {
    let is_open = |quote: char| before.matches(quote).count() % 2 == 1;
    let is_around = |quote: char| before.ends_with(quote) && after.starts_with(quote);
    before.contains("<<") || ['\'', '"', '`'].into_iter().any(|quote| is_open(quote) || is_around(quote))
}

/// Quotes a path as one word of the shell. A path of plain characters stays as it is.
fn quote(path: &[u8]) -> Vec<u8> {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+=:,%@".contains(byte);
    if path.iter().all(is_plain) && !path.is_empty() {
        return path.to_vec();
    }
    let mut quoted = vec![b'\''];
    for &byte in path {
        if byte == b'\'' {
            quoted.extend_from_slice(br"'\''");
        } else {
            quoted.push(byte);
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn placeholders_become_quoted_path() {
        for (command, expected) in [
            ("eval {}", "eval 'a b'"),
            ("eval --a={} {} x", "eval --a='a b' 'a b' x"),
            ("awk '{ print \"x\" }' \"$A\" {}", "awk '{ print \"x\" }' \"$A\" 'a b'"),
            ("eval $(cat {}) `nproc` {}", "eval $(cat 'a b') `nproc` 'a b'"),
            ("sh -c \"eval $POSTHOC_EMA_WEIGHTS\"", "sh -c \"eval $POSTHOC_EMA_WEIGHTS\""),
        ] {
            assert_eq!(String::from_utf8(Template::new(command).unwrap().fill(b"a b", None, &[])).unwrap(), expected);
        }
    }

    #[test]
    fn placeholder_inside_quotes_is_refused() {
        for command in [
            "eval \"{}\"",
            "eval '{}'",
            "sh -c \"eval {}\"",
            "python -c 'load(\"{}\")'",
            "python -c \"load('{}')\"",
            "eval \"$(cat \"{}\")\"",
            "eval `cat {}`",
            "cat <<EOF\n{}\nEOF",
            "eval $'it\\'s' {}",
            "eval \"--weights={}\"",
        ] {
            let why = Template::new(command).unwrap_err();
            assert!(why.contains("{} inside quotes") && why.contains("use \"$POSTHOC_EMA_WEIGHTS\" there"), "{why}");
        }
    }

    #[test]
    fn numbers_replace_their_names_wherever_they_are() {
        let template = Template::new("eval {} --seed {repeat} 'on cuda:{job}' {other}").unwrap();
        let filled = template.fill(b"w", None, &[("{repeat}", 3), ("{job}", 0)]);
        assert_eq!(String::from_utf8(filled).unwrap(), "eval w --seed 3 'on cuda:0' {other}");
    }

    #[test]
    fn second_path_has_a_placeholder_of_its_own() {
        let template = Template::new("eval {} {with} {}").unwrap();
        let filled = template.fill(b"a {with}", Some(b"b {}"), &[]);
        assert_eq!(String::from_utf8(filled).unwrap(), "eval 'a {with}' 'b {}' 'a {with}'");
        assert!(template.has_second() && !Template::new("eval {}").unwrap().has_second());
        let why = Template::new("eval {} '{with}'").unwrap_err();
        assert!(why.contains("{with} inside quotes") && why.contains("use \"$POSTHOC_EMA_WITH\" there"), "{why}");
    }

    #[test]
    fn command_without_path_is_refused() {
        assert!(Template::new("eval").unwrap_err().contains("names no file"));
    }

    #[test]
    fn quoted_path_is_one_shell_word() {
        let every: Vec<u8> = (1..=255).collect();
        for path in [b"/a/b-1.safetensors".as_slice(), b"", b"it's", b"a b\n$HOME `x` \"y\" \\ * ~ #", &every] {
            let script = Template::new("printf %s {}").unwrap().fill(path, None, &[]);
            let output = std::process::Command::new("sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
            assert!(output.status.success() && output.stdout == path, "{path:?}");
        }
        assert_eq!(quote(b"/a/b-1.safetensors"), b"/a/b-1.safetensors", "a plain path stays as it is");
    }
}
