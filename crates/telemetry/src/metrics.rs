//! An explicit Prometheus registry. Nothing is global: a process makes one [`Metrics`], hands it to what it builds, and
//! each part registers the [`definitions`](crate::definitions) it emits.

use std::collections::HashMap;

use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::process::ProcessMetrics;

/// What kind of series a definition describes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only grows; named `*_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Cumulative buckets with these upper bounds, and `+Inf`.
    Histogram(&'static [f64]),
}

/// One metric: everything that registration and documentation need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Definition {
    /// `hadal_<part>_<what>_<unit>`.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Labels beside those that the whole process carries. Each takes a handful of values.
    pub labels: &'static [&'static str],
    /// One sentence without a full stop.
    pub help: &'static str,
}

/// A registry whose every series carries the process's own labels (`deployment`, `pool`, `unit`, ...).
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    process: ProcessMetrics,
}

impl Metrics {
    /// A registry; `labels` are put on every series and must not clash with labels of the definitions.
    ///
    /// # Errors
    /// When a label's name is not one that Prometheus allows.
    pub fn new(labels: &[(&str, &str)]) -> Result<Self, prometheus::Error> {
        let labels: HashMap<String, String> = labels
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        let registry = Registry::new_custom(None, Some(labels))?;
        let metrics = Self {
            process: ProcessMetrics::unregistered()?,
            registry,
        };
        metrics.process.register(&metrics.registry)?;
        Ok(metrics)
    }

    /// Registers a counter.
    ///
    /// # Errors
    /// When the definition was registered before or its name is not allowed.
    pub fn counter(&self, definition: &Definition) -> Result<IntCounterVec, prometheus::Error> {
        debug_assert_eq!(definition.kind, Kind::Counter, "{}", definition.name);
        let made = IntCounterVec::new(opts(definition), definition.labels)?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    /// Registers a gauge of whole numbers.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn int_gauge(&self, definition: &Definition) -> Result<IntGaugeVec, prometheus::Error> {
        debug_assert_eq!(definition.kind, Kind::Gauge, "{}", definition.name);
        let made = IntGaugeVec::new(opts(definition), definition.labels)?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    /// Registers a gauge of fractions.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn gauge(&self, definition: &Definition) -> Result<GaugeVec, prometheus::Error> {
        debug_assert_eq!(definition.kind, Kind::Gauge, "{}", definition.name);
        let made = GaugeVec::new(opts(definition), definition.labels)?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    /// Registers a histogram with the definition's buckets.
    ///
    /// # Errors
    /// As [`Metrics::counter`].
    pub fn histogram(&self, definition: &Definition) -> Result<HistogramVec, prometheus::Error> {
        let Kind::Histogram(buckets) = definition.kind else {
            return Err(prometheus::Error::Msg(format!(
                "{} is no histogram",
                definition.name
            )));
        };
        let opts = HistogramOpts::from(opts(definition)).buckets(buckets.to_vec());
        let made = HistogramVec::new(opts, definition.labels)?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    /// The registry itself, for collectors that compute their values when they are read.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// All series in the text format 0.0.4.
    ///
    /// # Errors
    /// When a metric family cannot be written (one that has no name or no sample).
    pub fn render(&self) -> Result<String, prometheus::Error> {
        self.process.refresh();
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn opts(definition: &Definition) -> Opts {
    Opts::new(definition.name, definition.help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definitions;

    #[test]
    fn a_series_carries_the_labels_of_its_process_and_its_own() {
        let metrics = Metrics::new(&[("pool", "decode"), ("unit", "decode-0")]).unwrap();
        let bytes = metrics.counter(&definitions::KV_TRANSFER_BYTES).unwrap();
        bytes.with_label_values(&["sent", "grpc"]).inc_by(7);
        let text = metrics.render().unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with("hadal_kv_transfer_bytes_total{"));
        let line = line.unwrap();
        for part in [
            "pool=\"decode\"",
            "unit=\"decode-0\"",
            "direction=\"sent\"",
            "} 7",
        ] {
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn the_same_definition_cannot_be_registered_twice() {
        let metrics = Metrics::new(&[]).unwrap();
        metrics
            .histogram(&definitions::ROUTER_REQUEST_DURATION)
            .unwrap();
        assert!(
            metrics
                .histogram(&definitions::ROUTER_REQUEST_DURATION)
                .is_err()
        );
    }
}
