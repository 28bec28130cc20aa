//! Listeners to stdout, in the form that was asked for.

use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write as _};

use crate::{
    cli::{Color, Output, ViewArgs},
    error::Result,
    filter::Filter,
    model::Listener,
    view::{
        column::{self, COLUMNS},
        json::{self, ListenerRecord},
        table::{self, Style},
    },
};

/// How to order listeners when `--sort` does not say.
pub(super) type Order = fn(&Listener, &Listener) -> std::cmp::Ordering;

pub(super) struct Printer {
    out: BufWriter<Stdout>,
    output: Output,
    style: Style,
    filter: Filter,
    order: Order,
}

impl Printer {
    pub(super) fn new(args: &ViewArgs, order: Order) -> Result<Self> {
        let stdout = io::stdout();
        let color = match args.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                stdout.is_terminal() && !no_color
            }
        };
        let order = args
            .sort
            .as_ref()
            .and_then(|key| COLUMNS.iter().find(|column| column.key == key))
            .map_or(order, |column| column.order);
        let output = args.output();
        let style = Style { wide: output == Output::Wide, header: !args.no_header, color };
        Ok(Self { out: BufWriter::new(stdout), output, style, filter: args.filter()?, order })
    }

    pub(super) fn is_json(&self) -> bool {
        self.output == Output::Json
    }

    /// Prints the listeners that pass the filter; `title` stands above a table.
    pub(super) fn listeners(
        &mut self,
        mut listeners: Vec<Listener>,
        title: Option<&str>,
    ) -> Result<()> {
        listeners.retain(|listener| self.filter.matches(listener));
        listeners.sort_by(|a, b| (self.order)(a, b).then_with(|| column::by_address(a, b)));
        if self.is_json() {
            for listener in &listeners {
                json::write(&mut self.out, &ListenerRecord::from(listener))?;
                self.out.flush()?;
            }
            return Ok(());
        }
        if let Some(title) = title.filter(|_| self.style.header) {
            writeln!(self.out, "{title}")?;
        }
        table::write(&mut self.out, &listeners, self.style)?;
        if title.is_some() && self.style.header {
            writeln!(self.out)?;
        }
        self.out.flush()?;
        Ok(())
    }

    pub(super) fn record(&mut self, record: &impl serde::Serialize) -> Result<()> {
        json::write(&mut self.out, record)?;
        self.out.flush()?;
        Ok(())
    }
}
