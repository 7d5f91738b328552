//! Numbers as texts for people.

/// Formats a number to four significant digits, in the shorter notation.
pub fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e6).contains(&value.abs()) {
        return format!("{value:.3e}");
    }
    // The exponent after rounding to four digits: 0.99999 is 1.000 and not 1.0000.
    let exponent: i32 = format!("{value:.3e}").rsplit('e').next().and_then(|e| e.parse().ok()).unwrap_or(0);
    let digits = (3 - exponent).max(0) as usize;
    format!("{value:.digits$}")
}

/// Formats a number to the fifteen digits that every f64 holds: 0.1 instead of 0.10000000000000002.
pub fn exact(value: f64) -> String {
    let rounded: f64 = format!("{value:.14e}").parse().unwrap_or(value);
    rounded.to_string()
}

/// Formats a share in whole percent.
pub fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

/// Formats a share in percent to four digits; `<0.001%` for the smallest above 0.
pub fn share(share: f64) -> String {
    let percent = 100.0 * share;
    if percent > 0.0 && percent < 1e-3 { "<0.001%".into() } else { format!("{}%", number(percent)) }
}

/// Formats a share in percent to about two digits, and the smallest shares as powers of ten.
pub fn short_percent(share: f64) -> String {
    let percent = 100.0 * share;
    match percent {
        10.0.. => format!("{percent:.0}%"),
        1.0.. => format!("{percent:.1}%"),
        0.01.. => format!("{percent:.2}%"),
        _ => tick(format!("{share:.1e}").parse().unwrap_or(share)),
    }
}

/// Formats the value of a tick: 0.01, 250, 10⁻⁵, 2×10⁷.
pub fn tick(value: f64) -> String {
    if value == 0.0 || (1e-3..1e5).contains(&value.abs()) {
        return shortest(value).to_string().replace('-', "−");
    }
    power(value)
}

/// Formats the value of a tick among those of many decades: 10⁻², 2×10⁷, and 1.
pub fn power(value: f64) -> String {
    if value == 1.0 {
        return "1".into();
    }
    let text = format!("{:e}", shortest(value));
    let (factor, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let power = format!("10{}", exponent.chars().map(superscript).collect::<String>());
    match factor {
        "1" => power,
        "-1" => format!("−{power}"),
        _ => format!("{}×{power}", factor.replace('-', "−")),
    }
}

fn superscript(digit: char) -> char {
    match digit {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        '0' | '4'..='9' => char::from_u32('⁰' as u32 + digit as u32 - '0' as u32).unwrap_or(digit),
        other => other,
    }
}

/// Rounds to ten significant digits: a product such as 3 * 0.1 has digits that no person would write.
pub fn shortest(value: f64) -> f64 {
    format!("{value:.9e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1.000"),
            (0.999_999, "1.000"),
            (999_999.9, "1000000"),
            (0.034115096, "0.03412"),
            (13.366189, "13.37"),
            (-222.2639, "-222.3"),
            (390_000.0, "390000"),
            (1.2286e-13, "1.229e-13"),
            (3.5e8, "3.500e8"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn shares_have_four_digits() {
        for (value, text) in [
            (1.0 / 3.0, "33.33%"),
            (1.0, "100.0%"),
            (0.0, "0%"),
            (0.9943170, "99.43%"),
            (3.9e-5, "0.003900%"),
            (1e-11, "<0.001%"),
        ] {
            assert_eq!(share(value), text);
        }
    }

    #[test]
    fn short_percents_have_about_two_digits() {
        for (share, text) in [(0.26, "26%"), (0.0612, "6.1%"), (0.00617, "0.62%"), (1.23e-5, "1.2×10⁻⁵"), (0.0, "0")]
        {
            assert_eq!(short_percent(share), text);
        }
    }

    #[test]
    fn ticks_are_plain_numbers_or_powers_of_ten() {
        for (value, text) in
            [(0.15, "0.15"), (-0.2, "−0.2"), (1e-8, "10⁻⁸"), (2e-5, "2×10⁻⁵"), (-1e12, "−10¹²"), (0.0, "0")]
        {
            assert_eq!(tick(value), text);
        }
        assert_eq!((power(0.01), power(1.0)), ("10⁻²".into(), "1".into()));
    }
}
