//! Profiles as CSV, compared with a simpler parser.

use posthoc_ema::Profile;

#[path = "../../../src/commands/profile_csv.rs"]
mod profile_csv;

/// Reads a table, and compares it with a reading line by line if it has no quotes, comments or empty fields.
pub fn check(bytes: &[u8]) {
    let read = profile_csv::read(bytes);
    if let Ok(profile) = &read {
        let text = serde_json::to_string(profile).unwrap();
        assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), *profile);
        let mut before = 0.0;
        for tau in 0..=100 {
            let share = profile.cumulative(f64::from(tau), 100.0);
            assert!(share >= before && share <= 1.0, "{share} at {tau} follows {before}");
            before = share;
        }
        assert_eq!(before, 1.0);
    }
    if let Some(points) = std::str::from_utf8(bytes).ok().and_then(plain) {
        match (read, Profile::table(points)) {
            (Ok(read), Ok(plain)) => assert_eq!(read, plain),
            (Err(_), Err(_)) => {}
            (read, plain) => panic!("{read:?} differs from {plain:?}"),
        }
    }
}

/// Returns the pairs of a text that has only lines of two numbers.
fn plain(text: &str) -> Option<Vec<(f64, f64)>> {
    let number = |field: &str| field.bytes().all(|b| b.is_ascii_digit() || b == b'.').then(|| field.parse().ok())?;
    text.lines().map(|line| line.split_once(',').and_then(|(a, b)| Some((number(a)?, number(b)?)))).collect()
}
