//! Where the path goes in a command of the shell.

/// What stands for the path, and the same with quotes of its own.
const PLACES: [&[u8]; 3] = [b"{}", b"\"{}\"", b"'{}'"];

/// A command that is cut where the path goes: between its pieces.
#[derive(Clone, Debug)]
pub(super) struct Template(Vec<Vec<u8>>);

/// What the shell makes of the next byte.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Plain,
    Single,
    Double,
    Backquote,
    Comment,
}

/// Reads a command as the shell does, as far as quotes go.
struct Reader<'a> {
    rest: &'a [u8],
    state: State,
    /// Quotes begin anew within what was met, or have another meaning: from here on nobody can tell.
    unsure: bool,
    pieces: Vec<Vec<u8>>,
}

impl Template {
    /// Cuts a command. The path will be one quoted word, so that quotes right around its place are dropped.
    ///
    /// # Errors
    /// Why the path has no safe place.
    pub(super) fn new(command: &str) -> Result<Template, String> {
        let mut reader =
            Reader { rest: command.as_bytes(), state: State::Plain, unsure: false, pieces: vec![Vec::new()] };
        while !reader.rest.is_empty() {
            reader.step().map_err(|()| {
                format!(
                    "`{command}` has {{}} within quotes or what may be some, where a path cannot be put safely: leave the \
                     quotes out, as the path is quoted anyway, or write $POSTHOC_EMA_WEIGHTS"
                )
            })?;
        }
        if reader.pieces.len() < 2 {
            return Err(format!("`{command}` names no file: write {{}} where the path of the weights goes"));
        }
        Ok(Template(reader.pieces))
    }

    /// The command with a quoted path in all its places.
    pub(super) fn fill(&self, quoted: &[u8]) -> Vec<u8> {
        self.0.join(quoted)
    }
}

impl Reader<'_> {
    /// Takes a place, an escaped byte, or a byte.
    fn step(&mut self) -> Result<(), ()> {
        let place = PLACES.iter().find(|place| self.rest.starts_with(place));
        match (place, self.state) {
            (_, State::Comment) => {}
            (Some(place), State::Plain) if !self.unsure => {
                self.rest = &self.rest[place.len()..];
                self.pieces.push(Vec::new());
                return Ok(());
            }
            (Some(place), _) if self.state != State::Plain && place.len() == 2 || self.unsure => return Err(()),
            _ => {}
        }
        let escaped = self.rest[0] == b'\\' && self.state != State::Single && self.rest.len() > 1;
        if !escaped || self.state == State::Comment {
            self.turn();
            self.take(1);
        } else {
            self.take(2);
        }
        Ok(())
    }

    /// What the next byte does to the state.
    fn turn(&mut self) {
        let after_blank =
            self.pieces.last().and_then(|piece| piece.last()).is_none_or(|last| b" \t\n;|&(".contains(last));
        let starts = |what: &[u8]| self.rest.starts_with(what);
        self.unsure |= match self.state {
            State::Plain => starts(b"<<") || starts(b"$'"),
            State::Double => starts(b"$(") || starts(b"${") || starts(b"`"),
            _ => false,
        };
        self.state = match (self.state, self.rest[0]) {
            (State::Plain, b'\'') => State::Single,
            (State::Plain, b'"') => State::Double,
            (State::Plain, b'`') => State::Backquote,
            (State::Plain, b'#') if after_blank => State::Comment,
            (State::Single, b'\'') | (State::Double, b'"') | (State::Backquote, b'`') | (State::Comment, b'\n') => {
                State::Plain
            }
            (state, _) => state,
        };
    }

    fn take(&mut self, bytes: usize) {
        let (taken, rest) = self.rest.split_at(bytes);
        if let Some(piece) = self.pieces.last_mut() {
            piece.extend_from_slice(taken);
        }
        self.rest = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_put_where_it_is_one_word() {
        for (command, expected) in [
            ("eval {}", "eval 'P'"),
            ("eval \"{}\" '{}' --a={} x", "eval 'P' 'P' --a='P' x"),
            ("awk '{ print \"x\" }' \"$A\" {}", "awk '{ print \"x\" }' \"$A\" 'P'"),
            ("eval \\' {} \\\"", "eval \\' 'P' \\\""),
            ("eval $(cat {}) `nproc` {} # it's {}\necho {}#", "eval $(cat 'P') `nproc` 'P' # it's {}\necho 'P'#"),
            ("a \"\"{}'' $#{}", "a \"\"'P''' $#'P'"),
        ] {
            assert_eq!(String::from_utf8(Template::new(command).unwrap().fill(b"'P'")).unwrap(), expected);
        }
    }

    #[test]
    fn a_path_within_quotes_is_refused() {
        for command in [
            "sh -c \"eval {}\"",
            "python -c 'load(\"{}\")'",
            "python -c \"load('{}')\"",
            "eval \"$(cat \"{}\")\"",
            "eval `cat {}`",
            "cat <<EOF\n{}\nEOF",
            "eval $'it\\'s' {}",
            "eval \"--weights={}\"",
        ] {
            assert!(Template::new(command).unwrap_err().contains("within quotes"), "{command}");
        }
        for command in ["eval", "eval # {}"] {
            assert!(Template::new(command).unwrap_err().contains("names no file"), "{command}");
        }
    }
}
