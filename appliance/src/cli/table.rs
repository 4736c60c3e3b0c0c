//! Columns that line up.

use std::fmt;

/// Rows of texts under a heading; the last column is not padded.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(heading: &[&str]) -> Self {
        let heading = heading.iter().map(|name| (*name).to_owned()).collect();
        Self {
            rows: vec![heading],
        }
    }

    pub(super) fn row(&mut self, cells: &[String]) {
        self.rows.push(cells.to_vec());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows[0].len();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line += &format!("{cell:<width$}  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// The two largest units of a time in milliseconds: `3d4h`, `5m2s`, `17s`.
pub(super) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    let units = [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)];
    let first = units
        .iter()
        .position(|(_, size)| seconds >= *size)
        .unwrap_or(3);
    let (name, size) = units[first];
    let mut text = format!("{}{name}", seconds / size);
    if let Some((name, smaller)) = units.get(first + 1)
        && seconds % size / smaller > 0
    {
        text += &format!("{}{name}", seconds % size / smaller);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_with_text() {
        let mut table = Table::new(&["A", "LONG", "NOTE"]);
        table.row(&["xyz".into(), "ü".into(), String::new()]);
        assert_eq!(table.to_string(), "A    LONG  NOTE\nxyz  ü\n");
    }

    #[test]
    fn times_have_two_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (61, "1m1s"),
            (3600, "1h"),
            (90_061, "1d1h"),
        ] {
            assert_eq!(duration(seconds * 1000), text);
        }
    }
}
