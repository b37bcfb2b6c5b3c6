//! The customers, who place one order after another.

use std::io;

use tokio::task::JoinHandle;

use super::{Leash, Task, life::Report};
use crate::{Failure, input::FIRST_LINE, order_service::OrderBook};

/// How many orders one transaction places.
const AT_ONCE: usize = 20;

/// Places all orders that were not placed before, on a separate thread.
pub(super) async fn start(task: &Task, leash: Leash) -> Result<JoinHandle<Result<(), Failure>>, Failure> {
    let mut book = OrderBook::open(&task.settings).await?;
    let lines = std::fs::read_to_string(&task.input)?;
    Ok(tokio::task::spawn_blocking(move || {
        place_all(&mut book, &lines, &leash)
    }))
}

fn place_all(book: &mut OrderBook, lines: &str, leash: &Leash) -> Result<(), Failure> {
    let placed = book.last()?.map_or(0, |last| (last + 1 - FIRST_LINE) as usize);
    let orders: Vec<(u32, &str)> = (FIRST_LINE..).zip(lines.lines()).skip(placed).collect();
    for orders in orders.chunks(AT_ONCE) {
        if leash.stopped().is_cancelled() {
            return Ok(());
        }
        book.place(orders)?;
        for (number, _) in orders {
            leash.report(Report::Placed(*number))?;
        }
    }
    leash.report(Report::AllPlaced)
}

/// Writes the orders to a file that the order service reads.
pub(super) fn write(path: &std::path::Path, lines: &[String]) -> io::Result<()> {
    std::fs::write(path, lines.iter().map(|line| format!("{line}\n")).collect::<String>())
}
