//! Score at the end of a command's output, or values of several metrics in it.

use super::scores::Scores;

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

/// Parses the values of metrics, each from the last line that begins with its name: `fid: 2.1`, `acc = 0.93`. Several
/// numbers in a line are several measurements: `fid: 2.1 2.3 2.2`.
///
/// # Errors
/// Returns the reason if a name has no line, if there is something else than numbers in it, or if the names have
/// different numbers of values.
pub(super) fn named_scores(output: &str, names: &[String]) -> Result<Scores, String> {
    let columns: Vec<Vec<f64>> = names.iter().map(|name| named_values(output, name)).collect::<Result<_, _>>()?;
    let rows = columns.first().map_or(0, Vec::len);
    if let Some((name, column)) = names.iter().zip(&columns).find(|(_, column)| column.len() != rows) {
        return Err(format!("it printed {} values of {name}, and {rows} of {}", column.len(), names[0]));
    }
    let row = |i: usize| columns.iter().map(|column| column[i]).collect();
    Ok(Scores::of_rows((0..rows).map(row).collect()))
}

/// Parses the numbers in the last line of a metric.
fn named_values(output: &str, name: &str) -> Result<Vec<f64>, String> {
    let values_of = |line: &str| {
        let rest = line.trim().strip_prefix(name)?.trim_start();
        rest.strip_prefix([':', '=']).map(str::to_owned)
    };
    let Some(values) = output.lines().rev().find_map(values_of) else {
        return Err(format!("no line of its output begins with `{name}:`"));
    };
    let numbers: Option<Vec<f64>> = values.split_whitespace().map(|word| word.parse().ok()).collect();
    let numbers = numbers.filter(|numbers| !numbers.is_empty());
    numbers.ok_or_else(|| format!("the line of {name} has no numbers after the name: {}", shorten(&values)))
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
    fn named_values_are_in_the_last_line_of_their_name() {
        let names = ["fid", "acc"].map(str::to_owned);
        for (output, expected) in [
            ("fid: 2.5\nacc: 0.9\n", vec![vec![2.5, 0.9]]),
            (" acc=0.9 \nfid = -1e3\ndone", vec![vec![-1e3, 0.9]]),
            ("fid: 9\nfid_clip: 3\nacc: 1 2 3\nfid: 4 5 6", vec![vec![4.0, 1.0], vec![5.0, 2.0], vec![6.0, 3.0]]),
        ] {
            assert_eq!(named_scores(output, &names), Ok(Scores::of_rows(expected)), "{output}");
        }
        for (output, part) in [
            ("", "no line of its output begins with `fid:`"),
            ("fid: 2\nfid_acc: 3", "begins with `acc:`"),
            ("fid: 2\nacc:", "the line of acc has no numbers"),
            ("fid: 2\nacc: 93%", "93%"),
            ("fid: 2 3\nacc: 1", "1 values of acc, and 2 of fid"),
            ("my fid: 2", "begins with `fid:`"),
        ] {
            let why = named_scores(output, &names).unwrap_err();
            assert!(why.contains(part), "{output}: {why}");
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
