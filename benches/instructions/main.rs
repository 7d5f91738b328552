//! Counts the instructions of the hot loops for each element, which no noise of the machine changes.
//!
//! The benchmark steps through itself by ptrace, one instruction at a time, over two sizes of the same work. The
//! difference is the cost of more elements. `cargo bench --bench instructions` compares the counts with `counts.json`,
//! and fails if a loop has grown by a twentieth; `BLESS=1` updates the file. Counts depend on the compiler, which the
//! file names.

mod work;

#[cfg(target_os = "linux")]
mod count;

#[cfg(target_os = "linux")]
fn main() {
    let asked: Option<String> = std::env::args().skip_while(|argument| argument != count::CHILD).nth(1);
    match asked {
        Some(row) => count::be_counted(&row),
        None => compare::run(),
    }
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("instructions are counted on Linux only");
}

#[cfg(target_os = "linux")]
mod compare {
    use std::collections::BTreeMap;
    use std::path::Path;

    use serde::{Deserialize, Serialize};

    use super::{count, work};

    /// Contents of `counts.json`.
    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Stored {
        /// Compiler of the counted loops.
        rustc: String,
        /// Instructions for each element, by the work and the instruction set.
        per_element: BTreeMap<String, f64>,
    }

    /// Bounds of the new count over the stored one. Below the second, the stored count is out of date.
    const ALLOWED: (f64, f64) = (1.05, 0.90);

    pub fn run() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions/counts.json");
        let stored: Stored = std::fs::read(&path).map_or_else(
            |_| Stored::default(),
            |text| serde_json::from_slice(&text).expect("counts.json was written by BLESS=1"),
        );
        let counted: BTreeMap<String, f64> =
            work::rows().into_iter().map(|row| (row.name(), count::per_element(&row))).collect();
        println!("{:<50} {:>12} {:>8}", "instructions for each element", "now", "stored");
        for (name, count) in &counted {
            let before = stored.per_element.get(name).map_or("-".into(), |before| format!("{before:.3}"));
            println!("{name:<50} {count:>12.3} {before:>8}");
        }
        if std::env::var_os("BLESS").is_some() {
            // Keeps the stored counts of instruction sets that this machine lacks.
            let mut per_element = stored.per_element;
            per_element.extend(counted.iter().map(|(name, count)| (name.clone(), (count * 1e3).round() / 1e3)));
            let text = serde_json::to_string_pretty(&Stored { rustc: rustc(), per_element }).expect("it is plain data");
            std::fs::write(&path, text + "\n").expect("the repository can be written");
            return;
        }
        let faults = faults(&counted, &stored.per_element);
        if !faults.is_empty() {
            eprintln!("{}\nstored by {}, now {}", faults.join("\n"), stored.rustc, rustc());
            std::process::exit(1);
        }
    }

    fn faults(counted: &BTreeMap<String, f64>, stored: &BTreeMap<String, f64>) -> Vec<String> {
        let (most, least) = ALLOWED;
        let fault = |(name, &now): (&String, &f64)| match stored.get(name) {
            None => Some(format!("{name}: no count is stored: store it with BLESS=1")),
            Some(&before) if !(now <= most * before) => Some(format!(
                "{name}: {now:.3} instructions for each element, {before:.3} before: find the cause, or accept the \
                 count with BLESS=1"
            )),
            Some(&before) if !(now >= least * before) => {
                Some(format!("{name}: {now:.3} instead of {before:.3} instructions: store it with BLESS=1"))
            }
            Some(_) => None,
        };
        counted.iter().filter_map(fault).collect()
    }

    fn rustc() -> String {
        let output = std::process::Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into())).arg("-V").output();
        output.map_or("unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}
