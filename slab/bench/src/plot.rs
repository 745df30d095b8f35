//! Results as charts: bars for each workload, and curves where it is measured at several values.

use std::fs;
use std::path::Path;

use plotters::prelude::*;

use crate::measure::Measured;
use crate::peers::Role;
use crate::workloads::{Axis, Workload};

const SIZE: (u32, u32) = (960, 540);
const FONT: &str = "sans-serif";

/// Draws a chart for each workload into the directory: `W1.svg` and so on.
pub fn draw(directory: &Path, name: &str, measured: &[Measured]) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    for group in measured.chunk_by(|one, next| one.job.workload.name == next.job.workload.name) {
        let workload = group[0].job.workload;
        let suffix = if name == "times" { String::new() } else { format!("-{name}") };
        let unit = if name == "times" { workload.unit } else { "instructions a pair" };
        let path = directory.join(format!("{}{suffix}.svg", workload.name));
        let shown: Vec<_> = group.iter().filter(|one| one.median().is_some()).collect();
        if shown.is_empty() {
            continue;
        }
        let area = SVGBackend::new(&path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let title = format!("{workload} ({unit})");
        if workload.axis == Axis::None {
            bars(&area, &title, shown)?
        } else {
            curves(&area, &title, workload, &shown)?
        }
        area.present()?;
    }
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn colour(role: Role) -> RGBColor {
    match role {
        Role::Subject | Role::SubjectInBulk => RGBColor(196, 62, 28),
        Role::Peer => RGBColor(70, 110, 160),
        Role::Bound => RGBColor(160, 160, 160),
    }
}

/// A bar an allocator, the best on top; one that is far longer than the shortest ones ends at the edge.
fn bars<'a>(area: &Area<'a>, title: &str, mut shown: Vec<&Measured>) -> Drawn<'a> {
    let value = |one: &Measured| one.median().unwrap_or_default();
    shown.sort_by(|one, other| value(one).total_cmp(&value(other)));
    if !shown[0].job.workload.more_is_better {
        shown.reverse();
    }
    let middle = value(shown[shown.len() / 2]);
    let longest = shown.iter().map(|one| value(one)).fold(0.0, f64::max).min(5.0 * middle.max(0.001));
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(16)
        .x_label_area_size(36)
        .y_label_area_size(180)
        .build_cartesian_2d(0.0..longest * 1.15, (0..shown.len() - 1).into_segmented())?;
    let name = |number: &SegmentValue<usize>| match number {
        SegmentValue::CenterOf(number) => shown.get(*number).map_or("", |one| one.job.peer).to_owned(),
        _ => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().x_max_light_lines(1).y_labels(shown.len()).y_label_formatter(&name);
    mesh.label_style((FONT, 14)).draw()?;
    chart.draw_series(shown.iter().enumerate().map(|(number, one)| {
        let end = value(one).min(longest);
        let corners = [(0.0, SegmentValue::Exact(number)), (end, SegmentValue::Exact(number + 1))];
        let mut bar = Rectangle::new(corners, colour(one.job.role).filled());
        bar.set_margin(3, 3, 0, 0);
        bar
    }))?;
    chart.draw_series(shown.iter().enumerate().map(|(number, one)| {
        let place = (value(one).min(longest), SegmentValue::CenterOf(number));
        let cut = if value(one) > longest { ", cut off" } else { "" };
        EmptyElement::at(place) + Text::new(format!("{:.2}{cut}", value(one)), (5, -6), (FONT, 13))
    }))?;
    Ok(())
}

/// A curve an allocator, over what it is measured at; beside them their names, in the order in which the curves end.
fn curves<'a>(area: &Area<'a>, title: &str, workload: &Workload, shown: &[&Measured]) -> Drawn<'a> {
    let (left, right) = area.split_horizontally(SIZE.0 - 200);
    let points: Vec<u64> = workload.points();
    let values = shown.iter().filter_map(|one| one.median()).filter(|value| *value > 0.0);
    let (least, most) =
        values.fold((f64::INFINITY, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)));
    let along = -0.02..points.len() as f64 - 0.95;
    let mut chart = ChartBuilder::on(&left)
        .caption(title, (FONT, 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(along, (least / 1.5..most * 1.5).log_scale())?;
    let label = |number: &f64| {
        let exact = (number.round() - number).abs() < 0.05;
        let point = points.get(number.round() as usize).filter(|_| exact);
        point.map(|point| workload.axis.label(*point)).unwrap_or_default()
    };
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(workload.axis.name()).x_labels(points.len()).x_label_formatter(&label).x_max_light_lines(1);
    mesh.y_label_formatter(&f64::to_string).label_style((FONT, 14)).draw()?;

    let curves = curves_of(&points, shown);
    let style = |number: usize, role| match role {
        Role::Peer => HSLColor(number as f64 * 0.382 % 1.0, 0.6, 0.42).stroke_width(2),
        role => colour(role).stroke_width(4),
    };
    for (number, curve) in curves.iter().enumerate() {
        let style = style(number, curve.role);
        chart.draw_series(LineSeries::new(curve.points.iter().copied(), style).point_size(3))?;
        let y = 60 + 22 * number as i32;
        right.draw(&PathElement::new([(0, y), (20, y)], style))?;
        right.draw(&Text::new(curve.name, (28, y - 6), (FONT, 14)))?;
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Curve {
    name: &'static str,
    role: Role,
    /// The median, for the number of each value that it is measured at.
    points: Vec<(f64, f64)>,
}

/// The curves, the one that ends highest first.
fn curves_of(values: &[u64], shown: &[&Measured]) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for one in shown {
        let place = values.iter().position(|value| *value == one.job.point);
        let Some((place, median)) = place.zip(one.median()) else { continue };
        let point = (place as f64, median);
        match curves.iter_mut().find(|curve| curve.name == one.job.peer) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve { name: one.job.peer, role: one.job.role, points: vec![point] }),
        }
    }
    let end = |curve: &Curve| curve.points.last().map_or(0.0, |(_, median)| *median);
    curves.sort_by(|one, other| end(other).total_cmp(&end(one)));
    curves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Job;
    use crate::workloads::WORKLOADS;

    #[test]
    fn curves_come_in_the_order_in_which_they_end() {
        let workload = WORKLOADS.iter().find(|known| known.name == "W8").expect("a workload");
        let at = |peer, point, values: &[f64]| Measured {
            job: Job { workload, point, peer, role: Role::Peer },
            values: values.to_vec(),
        };
        let measured =
            [at("talc", 1_000, &[1.0]), at("rlsf", 1_000, &[]), at("talc", 10_000, &[2.0]), at("rlsf", 10_000, &[3.0])];
        let curves = curves_of(&workload.points(), &measured.iter().collect::<Vec<_>>());
        let curve = |name, points: &[(f64, f64)]| Curve { name, role: Role::Peer, points: points.to_vec() };
        assert_eq!(curves, [curve("rlsf", &[(1.0, 3.0)]), curve("talc", &[(0.0, 1.0), (1.0, 2.0)])]);
    }
}
