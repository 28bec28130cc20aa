//! How much each kernel's verifier has to look at: that is most of the start, and it grows unseen.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Result, ensure};

use crate::vm::{self, kernels};

/// With everything on and with nothing but the counts; what `-vv` says of each program at the end.
const COMMAND: &str = "
for verb in 'top --interval 1s' events; do
    for backend in fentry kprobe tracepoint; do
        echo \"== ${verb%% *}\"
        socktrace $verb -vv --json --duration 100ms --backend $backend 2>&1 >/dev/null |
            grep 'the verifier looked at'
    done
done
true";

/// A program by name, and what was asked for.
type Key = (String, String);

pub(crate) fn run() -> Result<()> {
    let mut table: BTreeMap<Key, Vec<Option<u64>>> = BTreeMap::new();
    for (column, kernel) in kernels::MATRIX.iter().enumerate() {
        let lines = vm::shell(kernel, COMMAND)?;
        for (key, instructions) in parse(&lines) {
            let row = table.entry(key).or_insert_with(|| vec![None; kernels::MATRIX.len()]);
            row[column] = Some(instructions);
        }
    }
    ensure!(!table.is_empty(), "no kernel said anything");
    let names: Vec<&str> = kernels::MATRIX.iter().map(|kernel| kernel.name).collect();
    print!("{}", render(&names, &table));
    Ok(())
}

/// `NAME: ... the verifier looked at N instructions`, below a line with the verb.
fn parse(lines: &[String]) -> Vec<(Key, u64)> {
    let mut verb = "";
    let mut found = Vec::new();
    for line in lines {
        if let Some(name) = line.strip_prefix("== ") {
            verb = name;
            continue;
        }
        let Some((before, after)) = line.split_once(" runs, ") else { continue };
        let program = before.split(": ").nth(2).unwrap_or(before);
        let number = after.split("looked at ").nth(1).and_then(|rest| rest.split(' ').next());
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            found.push(((program.to_owned(), verb.to_owned()), number));
        }
    }
    found
}

/// A table in Markdown; kernels that do not tell have a dash.
fn render(kernels: &[&str], table: &BTreeMap<Key, Vec<Option<u64>>>) -> String {
    let mut text = format!("| program | for | {} |\n", kernels.join(" | "));
    text.push_str(&format!("| --- | --- |{}\n", " ---: |".repeat(kernels.len())));
    for ((program, verb), row) in table {
        let cells: Vec<String> = row
            .iter()
            .map(|n| n.filter(|&n| n != 0).map_or_else(|| "-".to_owned(), |n| n.to_string()))
            .collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {program} | {verb} | {} |", cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_verifiers_said_becomes_a_table() {
        let lines = [
            "== top",
            "socktrace: DEBUG: fentry_x: 0 runs, 0 ns each; the verifier looked at 13 instructions",
            "something else",
            "== events",
            "socktrace: DEBUG: fentry_x: 7 runs, 9 ns each; the verifier looked at 0 instructions",
        ]
        .map(str::to_owned);
        let found = parse(&lines);
        assert_eq!(found.len(), 2);
        let table = found.into_iter().map(|(key, n)| (key, vec![Some(n), None])).collect();
        assert_eq!(
            render(&["a", "b"], &table),
            "| program | for | a | b |\n| --- | --- | ---: | ---: |\n\
             | fentry_x | events | - | - |\n| fentry_x | top | 13 | - |\n"
        );
    }
}
