//! Score at the end of a command's output.

/// Parses the number at the end of the last line that is not empty: `0.31`, `loss 0.31`, `FID: 2.1`, `accuracy=0.93`.
///
/// It is strict, so that no wrong number is taken: `93%`, `0.5 s`, `12:34:56` and `[0.3]` are refused.
///
/// # Errors
/// Returns the reason if there is none.
pub(super) fn score(output: &str) -> Result<f64, String> {
    let Some(line) = output.lines().rev().map(str::trim).find(|line| !line.is_empty()) else {
        return Err("it printed nothing: its last line of output must end in a number".into());
    };
    let score = line.split_whitespace().next_back().and_then(parse_number);
    let score = score.ok_or_else(|| format!("its last line of output does not end in a number: {}", shorten(line)))?;
    if !score.is_finite() {
        return Err(format!("the score is {score}: a finite number is needed"));
    }
    Ok(score)
}

/// Parses a number, or one after a name: `loss=0.3`.
fn parse_number(word: &str) -> Option<f64> {
    if let Ok(number) = word.parse() {
        return Some(number);
    }
    let (name, value) = word.rsplit_once(['=', ':'])?;
    let is_name = name.starts_with(|c: char| c.is_alphabetic() || c == '_') && !name.contains(['=', ':']);
    if is_name { value.parse().ok() } else { None }
}

/// Cuts the beginning of a long line.
fn shorten(line: &str) -> String {
    const MAX_CHARS: usize = 200;
    match line.char_indices().rev().nth(MAX_CHARS) {
        Some((cut, _)) => format!("...{}", &line[cut..]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn score_is_at_end_of_last_line() {
        for (output, expected) in [
            ("0.25", 0.25),
            ("loading\n 0.25 \n\n", 0.25),
            ("1\n2\r\n", 2.0),
            ("FID: 3.5e-2", 0.035),
            ("val loss=-.5", -0.5),
            ("eval_loss:12", 12.0),
            ("step 10 of 10, accuracy +93", 93.0),
            ("epoch 3\t7", 7.0),
        ] {
            assert_eq!(score(output), Ok(expected), "{output}");
        }
    }

    #[test]
    fn other_output_is_refused() {
        for (output, part) in [
            ("", "printed nothing"),
            (" \n\n", "printed nothing"),
            ("0.3\ndone", "does not end in a number: done"),
            ("93%", "93%"),
            ("0.5 s", "0.5 s"),
            ("finished at 12:34:56", "12:34:56"),
            ("a=b=3", "a=b=3"),
            ("2026-11-23", "2026-11-23"),
            ("[0.3]", "[0.3]"),
            ("{\"loss\": 0.3}", "0.3}"),
            ("1,234", "1,234"),
            ("0x10", "0x10"),
            ("loss nan", "the score is NaN"),
            ("-inf", "the score is -inf"),
        ] {
            let why = score(output).unwrap_err();
            assert!(why.contains(part), "{output}: {why}");
        }
        let long = score(&"é".repeat(1000)).unwrap_err();
        assert!(long.chars().count() < 300, "{long}");
    }
}
