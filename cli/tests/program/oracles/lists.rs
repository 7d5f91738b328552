//! Lists on the command line, compared with a simpler parser.

use posthoc_ema::Retention;

#[path = "../../../src/commands/list.rs"]
mod list;

use list::{Count, Numbers, RetentionArg, Windows};

/// Reads a text as each kind of list.
pub fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match text.parse::<Numbers>() {
        Ok(Numbers(values)) => check_numbers(text, &values),
        Err(reason) => {
            check_reason(&reason);
            let plain = text.split(',').all(|item| item.trim().parse::<f64>().is_ok());
            assert!(!plain, "{text}: {reason}");
        }
    }
    match text.parse::<Windows>() {
        Ok(Windows(windows)) => assert_eq!(windows.len(), text.split(',').count()),
        Err(reason) => check_reason(&reason),
    }
    match text.parse::<Count>() {
        Ok(Count(count)) => assert!((1..=1_000_000_000_000_000_000).contains(&count), "{text}: {count}"),
        Err(reason) => check_reason(&reason),
    }
    match text.parse::<RetentionArg>() {
        Ok(RetentionArg(Retention::Steps(steps))) => assert!(!steps.is_empty() && steps.iter().all(|&step| step > 0)),
        Ok(RetentionArg(retention)) => retention.check().unwrap(),
        Err(reason) => check_reason(&reason),
    }
}

fn check_reason(reason: &str) {
    assert!(!reason.is_empty());
}

/// Walks the items from the left: each `...` continues the two values before it up to the one after it.
fn check_numbers(text: &str, values: &[f64]) {
    assert!(values.len() <= 10_000 + text.len(), "{} values", values.len());
    let items: Vec<&str> = text.split(',').map(str::trim).collect();
    let mut at = 0;
    let mut i = 0;
    while i < items.len() {
        if items[i] != "..." {
            let expected: f64 = items[i].parse().unwrap();
            assert_eq!(values[at].to_bits(), expected.to_bits(), "{text}");
            (at, i) = (at + 1, i + 1);
            continue;
        }
        let last: f64 = items[i + 1].parse().unwrap();
        let before = values[at - 2];
        let first = values[at - 1];
        let count = ((last - first) / (first - before)).round() as usize;
        assert_eq!(values[at + count - 1].to_bits(), last.to_bits(), "{text}");
        for (k, value) in values[at..at + count].iter().enumerate() {
            let share = (k + 1) as f64 / count as f64;
            let even = first * (1.0 - share) + last * share;
            let scale = first.abs().max(last.abs());
            assert!((value - even).abs() <= 2e-6 * scale, "{text}: {value}, not {even}");
        }
        (at, i) = (at + count, i + 2);
    }
    assert_eq!(at, values.len(), "{text}");
}
