//! Formats tables without borders that fit the terminal.
//!
//! Each row is one line where possible. If the terminal is too narrow, the last column is wrapped.
//! If that is not enough, dispensable columns are left out, one after the other. On an even
//! narrower terminal, each row becomes a block of lines with all of its cells.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell as TableCell, Color, ColumnConstraint, ContentArrangement, Table};

use crate::options::Context;

/// Minimum width of a wrapped last column, in columns of the terminal.
const WRAPPED: u16 = 24;

/// Gap between columns, in spaces.
const GAP: u16 = 2;

/// How tables are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    /// Columns of the terminal. `None` if standard output is not a terminal: every row then is one
    /// line.
    pub width: Option<u16>,
    /// Whether to use colors.
    pub color: bool,
}

/// Meaning of a cell, shown as a color.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// Neutral.
    Plain,
    /// As it should be (green).
    Good,
    /// Not yet, or only partly, as it should be (yellow).
    Wait,
    /// Not as it should be (red).
    Bad,
}

/// Text and meaning of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    text: String,
    tone: Tone,
}

/// Rows under headings. Columns without any text are not shown.
#[derive(Clone, Debug)]
pub(super) struct Grid {
    headings: Vec<&'static str>,
    spare: &'static [&'static str],
    rows: Vec<Vec<Cell>>,
}

impl Style {
    /// Returns the style for standard output.
    pub(crate) fn of(context: &Context) -> Self {
        Self { width: context.width, color: context.color }
    }
}

impl Cell {
    /// Creates a cell with a meaning. Control characters are shown as `?`, because text from other
    /// hosts must not control the terminal.
    pub(super) fn new(text: impl ToString, tone: Tone) -> Self {
        let text = text.to_string().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Self { text, tone }
    }
}

impl<T: ToString> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// Returns a cell for a value that may be absent.
pub(super) fn maybe<T: ToString>(value: Option<T>) -> Cell {
    value.map_or_else(|| Cell::from(""), Cell::from)
}

impl Grid {
    /// Creates a grid without rows.
    pub(super) fn new(headings: &[&'static str]) -> Self {
        Self { headings: headings.to_vec(), spare: &[], rows: Vec::new() }
    }

    /// Sets the columns that may be left out, the most dispensable one first.
    pub(super) fn spare(self, spare: &'static [&'static str]) -> Self {
        Self { spare, ..self }
    }

    /// Adds a row, which must have a cell for each heading.
    pub(super) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        assert_eq!(N, self.headings.len(), "a row has a cell for each heading");
        self.rows.push(cells.into());
    }

    /// Formats the grid as lines. A grid without rows becomes `(none)`.
    pub(super) fn render(mut self, style: Style) -> String {
        if self.rows.is_empty() {
            return "(none)\n".to_owned();
        }
        let rows = self.rows.clone();
        self.drop_columns(|_, column| rows.iter().all(|row| row[column].text.is_empty()));
        let Some(width) = style.width else { return self.table(style, None) };
        let mut narrower = self.clone();
        for spare in self.spare.iter().map(Some).chain([None]) {
            let widths = narrower.widths();
            let gaps = GAP * (widths.len() as u16).saturating_sub(1);
            let natural = widths.iter().sum::<u16>() + gaps;
            let last = widths.last().copied().unwrap_or(0);
            if natural <= width {
                return narrower.table(style, None);
            }
            if natural - last + last.min(WRAPPED) <= width {
                return narrower.table(style, Some(width));
            }
            if let Some(spare) = spare {
                narrower.drop_columns(|heading, _| heading == *spare);
            }
        }
        self.blocks(style, width)
    }

    /// Removes the columns whose heading and index satisfy `unwanted`.
    fn drop_columns(&mut self, unwanted: impl Fn(&str, usize) -> bool) {
        for column in (0..self.headings.len()).rev() {
            if unwanted(self.headings[column], column) {
                self.headings.remove(column);
                for row in &mut self.rows {
                    row.remove(column);
                }
            }
        }
    }

    fn widths(&self) -> Vec<u16> {
        let mut table = Table::new();
        table.set_header(&self.headings);
        for row in &self.rows {
            table.add_row(row.iter().map(|cell| &cell.text));
        }
        table.column_max_content_widths()
    }

    fn table(&self, style: Style, width: Option<u16>) -> String {
        let mut table = bare(style, width);
        table.set_header(self.headings.iter().map(|heading| heading.to_uppercase()));
        for row in &self.rows {
            table.add_row(row.iter().map(|cell| {
                styled(if cell.text.is_empty() { "-" } else { &cell.text }, cell.tone)
            }));
        }
        finished(table)
    }

    fn blocks(&self, style: Style, width: u16) -> String {
        let blocks = self.rows.iter().map(|row| {
            let pairs = self.headings.iter().zip(row).filter(|(_, cell)| !cell.text.is_empty());
            pairs_of(
                pairs.map(|(heading, cell)| (*heading, cell)),
                Style { width: Some(width), ..style },
            )
        });
        blocks.collect::<Vec<_>>().join("\n")
    }
}

/// Formats pairs as lines, with names on the left and values on the right.
pub(super) fn pairs_of<'a>(
    pairs: impl Iterator<Item = (&'a str, &'a Cell)>,
    style: Style,
) -> String {
    let mut table = bare(style, style.width);
    for (name, cell) in pairs {
        table.add_row([TableCell::new(name), styled(&cell.text, cell.tone)]);
    }
    finished(table)
}

fn bare(style: Style, width: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    match width {
        Some(width) => {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width + GAP)
        }
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    if style.color {
        table.enforce_styling()
    } else {
        table.force_no_tty()
    };
    table
}

fn styled(text: &str, tone: Tone) -> TableCell {
    let cell = TableCell::new(text);
    match tone {
        Tone::Plain => cell,
        Tone::Good => cell.fg(Color::Green),
        Tone::Wait => cell.fg(Color::Yellow),
        Tone::Bad => cell.fg(Color::Red),
    }
}

fn finished(mut table: Table) -> String {
    let last = table.column_count().saturating_sub(1);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, GAP));
        if index != last {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    let mut text = table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIPE: Style = Style { width: None, color: false };

    fn grid() -> Grid {
        let mut grid = Grid::new(&["host", "state", "nothing", "note"]);
        grid.row(["host2".into(), Cell::new("established", Tone::Good), "".into(), "".into()]);
        let note = "the name does not resolve, which is tried again all the time";
        grid.row(["a-longer-name.example".into(), "retrying".into(), "".into(), note.into()]);
        grid
    }

    #[test]
    fn a_pipe_gets_one_line_per_row() {
        assert_eq!(
            grid().render(PIPE),
            "HOST                   STATE        NOTE\n\
             host2                  established  -\n\
             a-longer-name.example  retrying     the name does not resolve, which is tried again \
             all the time\n"
        );
    }

    #[test]
    fn the_last_column_is_wrapped_on_a_terminal() {
        assert_eq!(
            grid().render(Style { width: Some(80), color: false }),
            "HOST                   STATE        NOTE\n\
             host2                  established  -\n\
             a-longer-name.example  retrying     the name does not resolve, which is tried\n\
             \x20                                   again all the time\n"
        );
    }

    #[test]
    fn a_narrow_terminal_gets_blocks() {
        assert_eq!(
            grid().render(Style { width: Some(40), color: false }),
            "host   host2\n\
             state  established\n\
             \n\
             host   a-longer-name.example\n\
             state  retrying\n\
             note   the name does not resolve, which\n\
             \x20      is tried again all the time\n"
        );
    }

    #[test]
    fn dispensable_columns_are_left_out_first() {
        let mut grid = Grid::new(&["name", "endpoint", "sent"]).spare(&["endpoint"]);
        grid.row(["host2", "192.0.2.12:6784", "4 KiB"].map(Cell::from));
        let style = Style { width: Some(24), color: false };
        assert_eq!(grid.clone().render(style), "NAME   SENT\nhost2  4 KiB\n");
        assert!(grid.render(Style { width: Some(40), ..style }).contains("192.0.2.12:6784"));
    }

    #[test]
    fn colors_appear_only_on_request_and_never_from_content() {
        let colored = grid().render(Style { width: None, color: true });
        assert!(colored.contains("\u{1b}[38;5;10m"), "{colored:?}");
        let mut hostile = Grid::new(&["name"]);
        hostile.row([Cell::from("a\u{1b}[2Jb\nc")]);
        assert_eq!(hostile.render(PIPE), "NAME\na?[2Jb?c\n");
    }

    #[test]
    fn a_grid_without_rows_says_none() {
        assert_eq!(Grid::new(&["name"]).render(PIPE), "(none)\n");
    }
}
