//! Rules that rename tensors.

use regex::{Captures, Regex};

use crate::checkpoint::unwrapped;
use crate::error::{Error, Result};

/// Name of the rule that takes away what wrappers of a model put before names.
const WRAPPERS: &str = "wrappers";

/// Name of the rule that takes away PEFT's name of an adapter.
const PEFT: &str = "peft";

/// Substitutions of PEFT's rule: it keeps the name of the adapter `default` out of its files.
const PEFT_SUBSTITUTIONS: [&str; 2] = [r"s/\.modules_to_save\.default\././", r"s/\.default(\.[^.]*)?$/\1/"];

/// Rule that renames tensors.
#[derive(Clone, Debug)]
pub(super) struct RenameRule {
    /// Text that the user gave.
    pub text: String,
    action: RenameAction,
}

#[derive(Clone, Debug)]
enum RenameAction {
    Unwrap,
    Substitute(Vec<Substitution>),
}

/// Substitution of a regular expression.
#[derive(Clone, Debug)]
struct Substitution {
    pattern: Regex,
    replacement: Vec<ReplacementPart>,
    everywhere: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum ReplacementPart {
    Text(String),
    /// Text of a group; 0 is the whole match.
    Group(usize),
}

impl RenameRule {
    /// Compiles a rule: a substitution, or the name of a preset.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub(super) fn new(text: &str) -> Result<RenameRule> {
        let compile = |rule: &str| {
            let wrong = |why| Error::Setting { option: "rename", reason: format!("`{rule}`: {why}") };
            Substitution::new(rule).map_err(wrong)
        };
        let action = match text {
            WRAPPERS => RenameAction::Unwrap,
            PEFT => RenameAction::Substitute(PEFT_SUBSTITUTIONS.map(compile).into_iter().collect::<Result<_>>()?),
            _ => RenameAction::Substitute(vec![compile(text)?]),
        };
        Ok(RenameRule { text: text.to_owned(), action })
    }

    /// Returns the presets that are tried if names do not fit a folder, with what they are for.
    pub(super) fn presets() -> Result<[(RenameRule, &'static str); 2]> {
        Ok([(RenameRule::new(WRAPPERS)?, "wrappers of a model"), (RenameRule::new(PEFT)?, "PEFT in memory")])
    }

    /// Returns true if the rule is not a preset, so that it must match a tensor.
    pub(super) fn must_match(&self) -> bool {
        self.text != WRAPPERS && self.text != PEFT
    }

    /// Returns the new name.
    pub(super) fn apply(&self, name: &str) -> String {
        match &self.action {
            RenameAction::Unwrap => unwrapped(name),
            RenameAction::Substitute(all) => all.iter().fold(name.to_owned(), |name, one| one.apply(&name)),
        }
    }
}

impl Substitution {
    /// Parses `s/PATTERN/REPLACEMENT/` with any separator, and `g` at the end to substitute everywhere.
    fn new(rule: &str) -> Result<Substitution, String> {
        let how = "write it as 's/PATTERN/REPLACEMENT/', or name a preset: wrappers, peft";
        let mut letters = rule.strip_prefix('s').ok_or(how)?.chars();
        let separator = letters.next().filter(|c| !c.is_alphanumeric() && *c != '\\').ok_or(how)?;
        let parts = split(letters.as_str(), separator);
        let [pattern, replacement, flags] = parts.as_slice() else { return Err(how.into()) };
        let everywhere = match flags.as_str() {
            "" => false,
            "g" => true,
            other => return Err(format!("`{other}` after the last {separator} is not a flag: only g is one")),
        };
        let pattern = Regex::new(pattern).map_err(|error| error.to_string())?;
        let replacement = parse_replacement(replacement);
        let groups = pattern.captures_len();
        for part in &replacement {
            if let ReplacementPart::Group(group) = part
                && *group >= groups
            {
                return Err(format!("the pattern has {} groups, so there is no \\{group}", groups - 1));
            }
        }
        Ok(Substitution { pattern, replacement, everywhere })
    }

    fn apply(&self, name: &str) -> String {
        let replace = |captures: &Captures<'_>| {
            let text = |part: &ReplacementPart| match part {
                ReplacementPart::Text(text) => text.clone(),
                ReplacementPart::Group(group) => captures.get(*group).map_or("", |found| found.as_str()).to_owned(),
            };
            self.replacement.iter().map(text).collect::<String>()
        };
        self.pattern.replacen(name, usize::from(!self.everywhere), replace).into_owned()
    }
}

/// Splits the text after the first separator of a rule. An escaped separator is an ordinary letter.
fn split(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        let last = parts.len() - 1;
        match letter {
            '\\' => match letters.next() {
                Some(escaped) if escaped == separator => parts[last].push(escaped),
                escaped => parts[last].extend(['\\'].into_iter().chain(escaped)),
            },
            _ if letter == separator => parts.push(String::new()),
            _ => parts[last].push(letter),
        }
    }
    parts
}

/// Parses a replacement, in which `&` is the whole match and `\1` the first group.
fn parse_replacement(text: &str) -> Vec<ReplacementPart> {
    let mut parts = Vec::new();
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        let group = match letter {
            '&' => Some(0),
            '\\' => match letters.next() {
                Some(escaped) => match escaped.to_digit(10) {
                    Some(group) => Some(group as usize),
                    None => {
                        plain.push(escaped);
                        None
                    }
                },
                None => None,
            },
            _ => {
                plain.push(letter);
                None
            }
        };
        if let Some(group) = group {
            parts.push(ReplacementPart::Text(std::mem::take(&mut plain)));
            parts.push(ReplacementPart::Group(group));
        }
    }
    parts.push(ReplacementPart::Text(plain));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn substitutions_are_those_of_sed() {
        for (rule, name, expected) in [
            (r"s/^_orig_mod\.//", "_orig_mod.a._orig_mod.b", "a._orig_mod.b"),
            ("s/a/b/", "aaa", "baa"),
            ("s/a/b/g", "aaa", "bbb"),
            (r"s|a/(\w+)|[\1]&|", "x.a/bc", "x.[bc]a/bc"),
            (r"s/\//\&\\/", "a/b", r"a&\b"),
            ("s,^,model.,", "a", "model.a"),
            (r"s/layers\.([0-9]+)\./blocks.\1.0./", "x.layers.12.w", "x.blocks.12.0.w"),
            ("wrappers", "module._orig_mod.a.module.b", "a.module.b"),
            ("peft", "base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
            ("peft", "base_model.model.q.lora_embedding_A.default", "base_model.model.q.lora_embedding_A"),
            ("peft", "base_model.model.score.modules_to_save.default.weight", "base_model.model.score.weight"),
            ("peft", "default.weight", "default.weight"),
        ] {
            assert_eq!(RenameRule::new(rule).unwrap().apply(name), expected, "{rule}");
        }
    }

    #[test]
    fn rules_that_cannot_be_used_are_refused() {
        for (rule, expected) in [
            ("_orig_mod.", "write it as"),
            ("s/a/b", "write it as"),
            ("sxaxbx", "write it as"),
            ("s", "write it as"),
            ("s/a/b/i", "`i` after the last / is not a flag"),
            ("s/(/b/", "unclosed group"),
            (r"s/(a)/\2/", "the pattern has 1 groups, so there is no \\2"),
        ] {
            let text = RenameRule::new(rule).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains("rename"), "{text}");
        }
    }
}
