//! Plots as SVG.

use crate::error::{Error, Result};
use crate::files::replace;
use crate::train::RangeTest;
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (900, 540);
const RAW: RGBColor = RGBColor(176, 184, 196);
const SMOOTHED: RGBColor = RGBColor(31, 90, 166);
const MARK: RGBColor = RGBColor(196, 64, 32);

/// Draws the loss over the learning rate, with `suggested` marked, into the SVG file `path`, in place of
/// one that is there.
///
/// # Errors
/// [`Error::Io`].
pub fn range_test(
    path: &Path,
    title: &str,
    test: &RangeTest,
    suggested: Option<f64>,
) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, title, test, suggested)
        .map_err(|e| Error::io("draw", path, std::io::Error::other(e.to_string())))?;
    replace(path, svg.as_bytes())
}

fn draw(
    svg: &mut String,
    title: &str,
    test: &RangeTest,
    suggested: Option<f64>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = &test.points;
    let smoothed = || points.iter().map(|point| (point.lr, point.smoothed));
    let (first, last) = (points[0].lr, points[points.len() - 1].lr);
    // What is of interest lies below the loss at the start; how far it shoots up in the end is not.
    let low = smoothed().fold(f64::INFINITY, |low, (_, loss)| low.min(loss));
    let start = points[0].smoothed;
    let high = smoothed().fold(start, |high, (_, loss)| high.max(loss));
    let top = high.min(start + 0.5 * (start - low).max(0.1 * start.abs()));
    let margin = 0.05 * (top - low).max(f64::MIN_POSITIVE);
    let (bottom, top) = (low - margin, top + margin);

    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d((first..last).log_scale(), bottom..top)?;
    chart
        .configure_mesh()
        .x_desc("learning rate per step (logarithmic)")
        .y_desc("loss, mean of a batch")
        .x_label_formatter(&|lr| format!("{lr:.0e}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.1))
        .axis_desc_style(("sans-serif", 16))
        .label_style(("sans-serif", 14))
        .draw()?;
    let line = |color: RGBColor| {
        move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3))
    };
    // Cut where it leaves the plot, rather than drawn beyond it.
    let within = |loss: f64| loss.clamp(bottom, top);
    let raw = points.iter().map(|point| (point.lr, within(point.loss)));
    chart
        .draw_series(LineSeries::new(raw, RAW))?
        .label("each step")
        .legend(line(RAW));
    let smoothed = smoothed().map(|(lr, loss)| (lr, within(loss)));
    chart
        .draw_series(LineSeries::new(smoothed, SMOOTHED.stroke_width(3)))?
        .label("smoothed")
        .legend(line(SMOOTHED));
    if let Some(lr) = suggested {
        let mark = [(lr, bottom), (lr, top)];
        chart
            .draw_series(LineSeries::new(mark, MARK.stroke_width(2)))?
            .label(format!("suggested: {lr:.2e}"))
            .legend(line(MARK));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 14))
        .draw()?;
    root.present()?;
    Ok(())
}
