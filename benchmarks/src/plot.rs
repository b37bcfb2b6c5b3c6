//! Draws results: the ratios of a contest by batch size, with their spread.

use std::{fs, ops::Range, path::Path};

use plotters::prelude::*;

use crate::{
    Result,
    batch::DEFAULTS,
    results::{Cell, Results},
};

const SIZE: (u32, u32) = (640, 360);

/// Draws a file per contest that has more than one batch size.
pub(crate) fn draw(results: &Results, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    let mut contests: Vec<(&str, Vec<&Cell>)> = Vec::new();
    // The defaults have the batch size of another row.
    for cell in results.cells().filter(|cell| cell.row != DEFAULTS) {
        match contests.last_mut() {
            Some((contest, cells)) if *contest == cell.contest => cells.push(cell),
            _ => contests.push((&cell.contest, vec![cell])),
        }
    }
    for (contest, mut cells) in contests {
        cells.sort_by_key(|cell| cell.batch);
        if cells.first().map(|cell| cell.batch) == cells.last().map(|cell| cell.batch) {
            continue;
        }
        let file = folder.join(format!("{}.svg", contest.replace([' ', ','], "-").replace("--", "-")));
        draw_contest(contest, &cells, results, &file)?;
        println!("{}", file.display());
    }
    Ok(())
}

fn draw_contest(contest: &str, cells: &[&Cell], results: &Results, file: &Path) -> Result<()> {
    let points: Vec<(f64, f64, f64, f64)> = cells
        .iter()
        .map(|cell| {
            let summary = results.summary(cell);
            (cell.batch as f64, summary.min, summary.ratio, summary.max)
        })
        .collect();
    let batches = 0.7..points.last().map_or(1.0, |last| last.0) * 1.4;
    let highest = points.iter().map(|point| point.3).fold(1.0, f64::max);
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = format!("{contest}: this library / loop by hand");
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(batches.clone().log_scale(), 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("records per commit")
        .y_desc("ratio of records/s: median, minimum and maximum")
        .x_label_formatter(&|batch| format!("{batch:.0}"))
        .draw()?;
    let on_par = |Range { start, end }: Range<f64>| LineSeries::new([(start, 1.0), (end, 1.0)], BLACK.stroke_width(1));
    chart.draw_series(on_par(batches))?;
    let line = points.iter().map(|(batch, _, ratio, _)| (*batch, *ratio));
    chart.draw_series(LineSeries::new(line, BLUE.stroke_width(2)))?;
    let bars = points
        .iter()
        .map(|(batch, min, ratio, max)| ErrorBar::new_vertical(*batch, *min, *ratio, *max, BLUE.filled(), 8));
    chart.draw_series(bars)?;
    root.present()?;
    Ok(())
}
