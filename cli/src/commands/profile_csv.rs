//! Profiles from tables of comma-separated values.

use std::io::Read;

use posthoc_ema::Profile;

/// Reads a table of `(tau/T, F)` pairs. A first line without numbers is a header.
///
/// # Errors
/// The reason, with the number of the row.
pub fn read(source: impl Read) -> Result<Profile, String> {
    let mut format = csv::ReaderBuilder::new();
    format.has_headers(false).flexible(true).trim(csv::Trim::All).comment(Some(b'#'));
    let mut points = Vec::new();
    for (i, record) in format.from_reader(source).records().enumerate() {
        let record = record.map_err(|error| error.to_string())?;
        let pair: Vec<Option<f64>> = record.iter().map(|field| field.parse().ok()).collect();
        match pair.as_slice() {
            [Some(time), Some(share)] => points.push((*time, *share)),
            [None, None] if i == 0 => {}
            _ => return Err(format!("row {}: two numbers are expected, tau/T and the cumulative share", i + 1)),
        }
    }
    Profile::table(points).map_err(|error| error.to_string())
}
