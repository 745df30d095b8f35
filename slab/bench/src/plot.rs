//! Results as charts: bars for each workload, and curves where it is measured at several values.

use std::fs;
use std::ops::Range;
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
        .build_cartesian_2d(0.0..longest * 1.12, (0..shown.len()).into_segmented())?;
    let name = |number: &SegmentValue<usize>| match number {
        SegmentValue::CenterOf(number) => shown.get(*number).map_or("", |one| one.job.peer).to_owned(),
        _ => String::new(),
    };
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh().y_labels(shown.len()).y_label_formatter(&name).label_style((FONT, 14)).draw()?;
    chart.draw_series(shown.iter().enumerate().map(|(number, one)| {
        let end = value(one).min(longest);
        let corners = [(0.0, SegmentValue::Exact(number)), (end, SegmentValue::Exact(number + 1))];
        let mut bar = Rectangle::new(corners, colour(one.job.role).filled());
        bar.set_margin(3, 3, 0, 0);
        bar
    }))?;
    chart.draw_series(shown.iter().enumerate().map(|(number, one)| {
        let place = (value(one).min(longest), SegmentValue::CenterOf(number));
        Text::new(format!(" {:.2}", value(one)), place, (FONT, 13))
    }))?;
    Ok(())
}

/// A curve an allocator, over what it is measured at.
fn curves<'a>(area: &Area<'a>, title: &str, workload: &Workload, shown: &[&Measured]) -> Drawn<'a> {
    let points: Vec<u64> = workload.points();
    let values = shown.iter().filter_map(|one| one.median()).filter(|value| *value > 0.0);
    let (least, most) =
        values.fold((f64::INFINITY, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)));
    let along: Range<f64> = 0.0..points.len() as f64 - 1.0 + 0.01;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .right_y_label_area_size(190)
        .build_cartesian_2d(along, (least / 1.5..most * 1.5).log_scale())?;
    let label = |number: &f64| {
        let exact = (number.round() - number).abs() < 0.05;
        let point = points.get(number.round() as usize).filter(|_| exact);
        point.map(|point| workload.axis.label(*point)).unwrap_or_default()
    };
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(workload.axis.name())
        .x_labels(points.len())
        .x_label_formatter(&label)
        .label_style((FONT, 14))
        .draw()?;
    let mut names: Vec<&str> = shown.iter().map(|one| one.job.peer).collect();
    names.sort_unstable();
    names.dedup();
    for (number, name) in names.into_iter().enumerate() {
        let of_name: Vec<_> = shown.iter().filter(|one| one.job.peer == name).collect();
        let style = match of_name[0].job.role {
            Role::Peer => Palette99::pick(number).stroke_width(2),
            role => colour(role).stroke_width(4),
        };
        let at = |one: &&&Measured| {
            let place = points.iter().position(|point| *point == one.job.point).unwrap_or_default();
            (place as f64, one.median().unwrap_or_default())
        };
        let line = LineSeries::new(of_name.iter().map(at), style).point_size(3);
        let in_legend = move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style);
        chart.draw_series(line)?.label(name).legend(in_legend);
    }
    let mut legend = chart.configure_series_labels();
    legend.position(SeriesLabelPosition::Coordinate(715, 10)).label_font((FONT, 13)).background_style(WHITE).draw()
}
