//! Reading values out of Prometheus' text format.

/// Sum of the series of a metric that carry a label, from the text format.
pub(crate) fn sum(text: &str, metric: &str, label: &str) -> u64 {
    text.lines()
        .filter_map(|line| {
            line.strip_prefix(metric)?
                .strip_prefix('{')?
                .rsplit_once("} ")
        })
        .filter(|(labels, _)| labels.split(',').any(|found| found == label))
        .filter_map(|(_, value)| value.trim().parse::<f64>().ok())
        .sum::<f64>() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_with_the_label_are_summed_and_others_are_not() {
        let text = "# TYPE a counter\na{direction=\"sent\",x=\"1\"} 3\na{x=\"2\",direction=\"sent\"} 4\n\
                    a{direction=\"received\"} 9\nab{direction=\"sent\"} 5\n";
        assert_eq!(sum(text, "a", "direction=\"sent\""), 7);
    }
}
