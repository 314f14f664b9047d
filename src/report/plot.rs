//! Plots as SVG: a range test into a file, the others as text, for a page and for files beside it.
//!
//! Colours are few and fixed, so that the style sheet of a page can put others in their place where a
//! reader prefers dark ones (`src/report/page.css`).

use super::plain;
use super::results::{BINS, Calibration};
use crate::error::{Error, Result};
use crate::files::replace;
use crate::train::RangeTest;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const SIZE: (u32, u32) = (900, 540);
/// Of a plot in a page, so that its letters can still be read at the width of a telephone.
const SMALL: (u32, u32) = (480, 336);
const RAW: RGBColor = RGBColor(176, 184, 196);
const SMOOTHED: RGBColor = RGBColor(31, 90, 166);
const MARK: RGBColor = RGBColor(196, 64, 32);

/// Names of lines that a plot has room for; more of them stand below it, two in a row of this height.
const MOST_INSIDE: usize = 4;
const ENTRY: u32 = 24;

/// Of the lines of a plot, one after the other.
pub const COLORS: [RGBColor; 8] = [
    SMOOTHED,
    RGBColor(196, 112, 27),
    RGBColor(46, 125, 80),
    RGBColor(124, 77, 163),
    MARK,
    RGBColor(19, 128, 146),
    RGBColor(138, 117, 24),
    RGBColor(96, 104, 117),
];

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// One line of a plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// In the legend; none where it is empty.
    pub name: String,
    /// What is not finite is left out.
    pub points: Vec<[f64; 2]>,
}

/// What a plot shows, and along what.
#[derive(Clone, Copy, Debug)]
pub struct Axes<'a> {
    /// Above the plot.
    pub title: &'a str,
    /// Quantity and unit along the plot.
    pub x: &'a str,
    /// Quantity and unit up the plot.
    pub y: &'a str,
    /// Whether the first axis counts, so that there is nothing between whole numbers.
    pub whole: bool,
}

/// Lines over one pair of axes, with a mark at each point where there are few; `None` where there is
/// nothing to draw.
///
/// # Errors
/// [`Error::Io`] where the plot cannot be drawn.
pub fn lines(axes: &Axes, lines: &[Line]) -> Result<Option<String>> {
    let drawn = |[x, y]: &[f64; 2]| x.is_finite() && y.is_finite() && y.abs() < 1e100;
    let lines: Vec<Line> = lines
        .iter()
        .map(|line| Line {
            name: plain(&line.name, 28),
            points: line.points.iter().copied().filter(drawn).collect(),
        })
        .collect();
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(None);
    }
    let range = |axis: usize| {
        let values = lines.iter().flat_map(|line| &line.points).map(|p| p[axis]);
        let none = (f64::INFINITY, f64::NEG_INFINITY);
        let (low, high) = values.fold(none, |(low, high), v| (low.min(v), high.max(v)));
        // Of one value alone, or nearly so, a range that has it in the middle.
        let least = 1e-6 * low.abs().max(high.abs()).max(1e-6);
        match high - low < least {
            true => (
                low - 0.5 * low.abs().max(1e-6),
                high + 0.5 * high.abs().max(1e-6),
            ),
            false => (low, high),
        }
    };
    let ((left, right), (low, high)) = (range(0), range(1));
    let margin = 0.06 * (high - low);
    let (bottom, top) = (low - margin, high + margin);
    // No tick below 0 where nothing is.
    let bottom = if low >= 0.0 { bottom.max(0.0) } else { bottom };
    let named: Vec<(usize, &Line)> = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| !line.name.is_empty() && !line.points.is_empty())
        .collect();
    // More of them would cover the plot.
    let below = match named.len() {
        0..=MOST_INSIDE => 0,
        count => ENTRY * count.div_ceil(2) as u32 + 8,
    };
    text((SMALL.0, SMALL.1 + below), |root| {
        let (root, legend) = root.split_vertically(SMALL.1 as i32);
        let mut chart = ChartBuilder::on(&root)
            .caption(axes.title, ("sans-serif", 20))
            .margin(8)
            .margin_right(18)
            .x_label_area_size(46)
            .y_label_area_size(68)
            .build_cartesian_2d(left..right, bottom..top)?;
        let labels = match axes.whole {
            true => (right - left).clamp(1.0, 5.0) as usize + 1,
            false => 6,
        };
        let whole = |x: &f64| match axes.whole && (x - x.round()).abs() > 1e-6 {
            true => String::new(),
            false => tick(*x, right - left),
        };
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .y_desc(axes.y)
            .x_labels(labels)
            .y_labels(7)
            .x_label_formatter(&whole)
            .y_label_formatter(&|y| tick(*y, top - bottom))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.1))
            .axis_desc_style(("sans-serif", 18))
            .label_style(("sans-serif", 17))
            .draw()?;
        for (i, line) in lines.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let points = || line.points.iter().map(|[x, y]| (*x, *y));
            let series = LineSeries::new(points(), color.stroke_width(2));
            let series = chart.draw_series(series)?;
            if below == 0 && !line.name.is_empty() && !line.points.is_empty() {
                series.label(&line.name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3))
                });
            }
            if line.points.len() <= 30 {
                chart.draw_series(points().map(|at| Circle::new(at, 3, color.filled())))?;
            }
        }
        for (at, (i, line)) in named.iter().enumerate().filter(|_| below > 0) {
            let (x, y) = (
                16 + 232 * (at as i32 % 2),
                ENTRY as i32 * (at as i32 / 2) + 10,
            );
            let stroke = COLORS[i % COLORS.len()].stroke_width(3);
            legend.draw(&PathElement::new([(x, y), (x + 18, y)], stroke))?;
            let style = ("sans-serif", 17).into_font().color(&BLACK);
            let style = style.pos(Pos::new(HPos::Left, VPos::Center));
            legend.draw(&Text::new(line.name.clone(), (x + 26, y), style))?;
        }
        if below == 0 && !named.is_empty() {
            chart
                .configure_series_labels()
                .position(emptiest(&lines, [left, right], [bottom, top]))
                .margin(8)
                .background_style(WHITE.mix(0.8))
                .border_style(BLACK.mix(0.15))
                .label_font(("sans-serif", 17))
                .draw()?;
        }
        Ok(())
    })
    .map(Some)
}

/// The place of a plot for its legend: the one that the lines cross least.
fn emptiest(lines: &[Line], [left, right]: [f64; 2], [low, high]: [f64; 2]) -> SeriesLabelPosition {
    use SeriesLabelPosition::*;
    let named = lines.iter().filter(|line| !line.name.is_empty());
    let longest = named.clone().map(|line| line.name.chars().count()).max();
    // About what it takes of the plot.
    let width = (0.12 + 0.024 * longest.unwrap_or(0) as f64).min(1.0);
    let height = (0.06 + 0.085 * named.count() as f64).min(1.0);
    let along = |size: f64| [1.0 - size, 0.0, 0.5 - size / 2.0];
    let ([x_end, x_begin, x_middle], [y_end, y_begin, y_middle]) = (along(width), along(height));
    let places = [
        (x_end, y_end, UpperRight),
        (x_end, y_begin, LowerRight),
        (x_begin, y_end, UpperLeft),
        (x_begin, y_begin, LowerLeft),
        (x_end, y_middle, MiddleRight),
        (x_begin, y_middle, MiddleLeft),
        (x_middle, y_end, UpperMiddle),
        (x_middle, y_begin, LowerMiddle),
    ];
    let place = |[x, y]: &[f64; 2]| [(x - left) / (right - left), (y - low) / (high - low)];
    let crossed = |x0: f64, y0: f64| {
        let inside =
            |[x, y]: [f64; 2]| (x0..=x0 + width).contains(&x) && (y0..=y0 + height).contains(&y);
        let of = |line: &Line| {
            let points: Vec<[f64; 2]> = line.points.iter().map(place).collect();
            let between = points.windows(2).flat_map(|pair| {
                let [[xa, ya], [xb, yb]] = [pair[0], pair[1]];
                // Finer where the points are few.
                let parts = 1 + (200.0 * (xb - xa).abs()).min(200.0) as usize;
                (0..=parts).map(move |i| {
                    let t = i as f64 / parts as f64;
                    [xa + t * (xb - xa), ya + t * (yb - ya)]
                })
            });
            between.filter(|at| inside(*at)).count()
                + usize::from(points.len() == 1 && inside(points[0]))
        };
        lines.iter().map(of).sum::<usize>()
    };
    let best = places.into_iter().min_by_key(|(x, y, _)| crossed(*x, *y));
    best.map_or(UpperRight, |(_, _, place)| place)
}

/// A reliability diagram: the accuracy of the images of each range of confidence, beside what it would
/// be if the confidence were to be trusted.
///
/// # Errors
/// As [`lines`].
pub fn reliability(calibration: &Calibration) -> Result<String> {
    text(SMALL, |root| {
        let mut chart = ChartBuilder::on(root)
            .caption("Reliability on the test images", ("sans-serif", 20))
            .margin(8)
            .margin_right(18)
            .x_label_area_size(46)
            .y_label_area_size(68)
            .build_cartesian_2d(0.0..100.0, 0.0..100.0)?;
        chart
            .configure_mesh()
            .x_desc("confidence, %")
            .y_desc("accuracy, %")
            .x_labels(6)
            .y_labels(6)
            .x_label_formatter(&|x| tick(*x, 100.0))
            .y_label_formatter(&|y| tick(*y, 100.0))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.1))
            .axis_desc_style(("sans-serif", 18))
            .label_style(("sans-serif", 17))
            .draw()?;
        let width = 100.0 / BINS as f64;
        let bins = calibration.bins.iter().enumerate();
        let bars = bins.filter(|(_, bin)| bin.images > 0).map(|(i, bin)| {
            let left = width * i as f64;
            let corners = [
                (left + 0.6, 0.0),
                (left + width - 0.6, 100.0 * bin.accuracy),
            ];
            Rectangle::new(corners, COLORS[0].mix(0.7).filled())
        });
        chart.draw_series(bars)?.label("accuracy").legend(|(x, y)| {
            Rectangle::new([(x, y - 5), (x + 18, y + 5)], COLORS[0].mix(0.7).filled())
        });
        let even = [(0.0, 0.0), (100.0, 100.0)];
        chart
            .draw_series(LineSeries::new(even, MARK.stroke_width(2)))?
            .label("as sure as right")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], MARK.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .margin(8)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.15))
            .label_font(("sans-serif", 17))
            .draw()?;
        Ok(())
    })
}

/// Milliseconds of each part of a step as bars, one below the other, with their share of all.
///
/// # Errors
/// As [`lines`].
pub fn times(title: &str, parts: &[(String, f64)]) -> Result<String> {
    const ROW: i32 = 26;
    let total: f64 = parts.iter().map(|(_, time)| time).sum();
    let largest = parts.iter().map(|(_, time)| *time).fold(0.0, f64::max);
    let names: Vec<String> = parts.iter().map(|(name, _)| plain(name, 32)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max();
    let (left, room) = (24 + 9 * longest.unwrap_or(1) as i32, 240);
    let size = (left + room + 160, 52 + ROW * parts.len() as i32);
    text((size.0 as u32, size.1 as u32), |root| {
        let font = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        let at = |side| font(17).pos(Pos::new(side, VPos::Center));
        root.draw(&Text::new(title.to_string(), (12, 12), font(20)))?;
        for (i, (name, (_, time))) in names.iter().zip(parts).enumerate() {
            let middle = 44 + ROW * i as i32 + ROW / 2;
            let end = left + (f64::from(room) * time / largest.max(f64::MIN_POSITIVE)) as i32;
            let name = Text::new(name.clone(), (left - 8, middle), at(HPos::Right));
            root.draw(&name)?;
            let corners = [(left, middle - 8), (end.max(left + 1), middle + 8)];
            root.draw(&Rectangle::new(corners, COLORS[0].filled()))?;
            let share = 100.0 * time / total.max(f64::MIN_POSITIVE);
            let value = format!("{time:.3} ms, {share:.1} %");
            root.draw(&Text::new(value, (end + 8, middle), at(HPos::Left)))?;
        }
        Ok(())
    })
}

/// A confusion matrix with its counts: a row for each true class, a column for each predicted one, shaded
/// by the share of the row.
///
/// # Errors
/// As [`lines`].
pub fn confusion(names: &[String], counts: &[Vec<usize>]) -> Result<String> {
    const CELL: i32 = 44;
    let names: Vec<String> = names.iter().map(|name| plain(name, 16)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max();
    let label = 26 + 9 * longest.unwrap_or(1) as i32;
    let side = CELL * names.len() as i32;
    let size = (
        (label + side + 16).max(280) as u32,
        (label + side + 80) as u32,
    );
    let (left, top) = (label, 48 + label);
    text(size, |root| {
        let font = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
        let center = |style: TextStyle<'static>| style.pos(Pos::new(HPos::Center, VPos::Center));
        root.draw(&Text::new("Confusion matrix", (12, 10), font(20)))?;
        root.draw(&Text::new(
            "rows: true class, columns: predicted",
            (12, 36),
            font(15),
        ))?;
        for (i, name) in names.iter().enumerate() {
            let middle = CELL * i as i32 + CELL / 2;
            let style = font(16).pos(Pos::new(HPos::Right, VPos::Center));
            root.draw(&Text::new(name.clone(), (left - 8, top + middle), style))?;
            let turned = ("sans-serif", 16)
                .into_font()
                .transform(FontTransform::Rotate270);
            let style = turned.color(&BLACK).pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&Text::new(name.clone(), (left + middle, top - 8), style))?;
        }
        for (t, row) in counts.iter().enumerate() {
            let images = row.iter().sum::<usize>().max(1) as f64;
            for (p, count) in row.iter().enumerate() {
                let (x, y) = (left + CELL * p as i32, top + CELL * t as i32);
                let corners = [(x, y), (x + CELL, y + CELL)];
                let color = if t == p { COLORS[0] } else { MARK };
                let share = (*count as f64 / images).sqrt();
                let least = if *count > 0 { 0.1 } else { 0.0 };
                let shade = color.mix(least + 0.5 * share);
                root.draw(&Rectangle::new(corners, shade.filled()))?;
                root.draw(&Rectangle::new(corners, BLACK.mix(0.15)))?;
                if *count > 0 {
                    let at = (x + CELL / 2, y + CELL / 2);
                    root.draw(&Text::new(count.to_string(), at, center(font(16))))?;
                }
            }
        }
        Ok(())
    })
}

/// An SVG of this size on white.
fn text(
    size: (u32, u32),
    draw: impl FnOnce(&DrawingArea<SVGBackend, Shift>) -> Drawn,
) -> Result<String> {
    let mut svg = String::new();
    let drawn = || -> Drawn {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root)?;
        root.present()?;
        Ok(())
    };
    drawn().map_err(|e| {
        let other = std::io::Error::other(e.to_string());
        Error::io("draw", Path::new("a plot"), other)
    })?;
    Ok(svg)
}

/// A number at an axis that spans so much, with as many digits as that asks for.
fn tick(value: f64, span: f64) -> String {
    // What the computer makes of 0.
    if value.abs() < 1e-9 * span {
        return "0".into();
    }
    if !(1e-4..1e6).contains(&value.abs()) {
        return format!("{value:.1e}");
    }
    let digits = (2.0 - span.log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    const AXES: Axes = Axes {
        title: "t",
        x: "x",
        y: "y",
        whole: true,
    };

    fn line(name: &str, points: &[[f64; 2]]) -> Line {
        Line {
            name: name.into(),
            points: points.into(),
        }
    }

    #[test]
    fn ticks_have_the_digits_that_their_axis_asks_for() {
        for (value, span, expected) in [
            (0.25, 1.0, "0.25"),
            (3.0, 10.0, "3"),
            (99.45, 1.5, "99.45"),
            (1400.0, 1400.0, "1400"),
            (1e-17, 1.0, "0"),
            (0.004, 0.004, "0.004"),
            (2e-5, 1e-4, "2.0e-5"),
            (3e7, 1e8, "3.0e7"),
        ] {
            assert_eq!(tick(value, span), expected);
        }
    }

    /// One point, equal points, huge and tiny ones, and what is no number: each ends, in a drawing where
    /// there is anything.
    #[test]
    fn odd_lines_are_drawn_or_left_out() {
        let odd: [&[[f64; 2]]; 7] = [
            &[[1.0, 0.5]],
            &[[1.0, 0.5], [2.0, 0.5]],
            &[[1.0, 0.0], [1.0, 0.0]],
            &[[1.0, 1e38], [2.0, -1e38]],
            &[[1.0, 1e-300], [2.0, 2e-300]],
            &[[1.0, 1.0], [2.0, 1.0 + 1e-15]],
            &[[1.0, f64::NAN], [2.0, f64::INFINITY], [3.0, 1.0]],
        ];
        for points in odd {
            let svg = lines(&AXES, &[line("a", points)]).unwrap().unwrap();
            assert!(svg.contains("<circle"), "{points:?}");
        }
        for nothing in [&[][..], &[line("a", &[])], &[line("a", &[[1.0, f64::NAN]])]] {
            assert_eq!(lines(&AXES, nothing).unwrap(), None);
        }
    }

    #[test]
    fn names_are_text_in_a_plot() {
        let name = "<script>&\u{1}\u{202e}";
        let svg = lines(&AXES, &[line(name, &[[0.0, 1.0], [1.0, 2.0]])]);
        let matrix = confusion(&[name.into(), "b".into()], &[vec![1, 0], vec![2, 0]]);
        for svg in [svg.unwrap().unwrap(), matrix.unwrap()] {
            assert!(svg.contains("&lt;script&gt;&amp;"), "{svg}");
            assert!(!svg.contains("<script") && !svg.contains(['\u{1}', '\u{202e}']));
        }
    }
}
