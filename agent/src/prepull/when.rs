//! On which nodes an entry counts: the node's labels, and its GPUs.
//!
//! Labels come from the configuration and from a file as the downward API writes it; GPUs from the
//! inventory. GPUs count whether they are free or not: a model belongs on such a
//! node, whoever uses it now.

use std::collections::BTreeMap;

use bytesize::ByteSize;
use globset::{GlobBuilder, GlobMatcher};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::gpu::{GpuInventory, ProviderState};

/// The labels of a node.
pub type Labels = BTreeMap<String, String>;

/// What a node must be. The default is any node.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct When {
    /// Labels that the node must have, with these values.
    pub labels: Labels,
    /// What its GPUs must be.
    pub gpus: Option<Gpus>,
}

/// What a node's GPUs must be.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Gpus {
    /// At least so many.
    pub count: usize,
    /// Of at least so much memory each.
    pub memory: ByteSize,
    /// Whose product name is like this.
    pub product: Option<Product>,
}

impl Default for Gpus {
    fn default() -> Self {
        Self { count: 1, memory: ByteSize(0), product: None }
    }
}

/// A pattern for a product's name: `*` and `?`, whatever the letters' case.
#[derive(Debug, Clone)]
pub struct Product(GlobMatcher);

impl PartialEq for Product {
    fn eq(&self, other: &Self) -> bool {
        self.0.glob() == other.0.glob()
    }
}

impl<'de> Deserialize<'de> for Product {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let glob = GlobBuilder::new(&text).case_insensitive(true).build();
        match glob {
            Ok(glob) if text.len() <= 200 => Ok(Self(glob.compile_matcher())),
            _ => {
                Err(D::Error::custom(format!("{text:?}: write a pattern such as \"NVIDIA H100*\"")))
            }
        }
    }
}

impl When {
    /// Nothing where the node suits, else what it lacks, in a few words.
    pub fn unmet(&self, labels: &Labels, gpus: &GpuInventory) -> Option<String> {
        for (key, wanted) in &self.labels {
            match labels.get(key) {
                Some(value) if value == wanted => {}
                Some(value) => return Some(format!("label {key} is {value:?}, not {wanted:?}")),
                None => return Some(format!("the node has no label {key}")),
            }
        }
        let wanted = self.gpus.as_ref()?;
        let fitting = gpus.gpus.iter().filter(|gpu| {
            let memory = gpu.memory.map_or(0, |memory| memory.total_bytes);
            let product = gpu.product.as_deref().unwrap_or_default();
            memory >= wanted.memory.as_u64()
                && wanted.product.as_ref().is_none_or(|pattern| pattern.0.is_match(product))
        });
        let found = fitting.count();
        if found >= wanted.count {
            return None;
        }
        let why = match gpus.provider.state {
            ProviderState::Ok | ProviderState::Stale => String::new(),
            state => format!(" (GPUs: {state})"),
        };
        Some(format!("{found} GPUs are such, {} are asked for{why}", wanted.count))
    }
}

/// Reads labels as the downward API writes them: `key="value"`, one a line, the value quoted
/// as Go does.
///
/// # Errors
///
/// Names the line.
pub fn read_labels(text: &str) -> Result<Labels, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let wrong = || format!("line {}: write key=\"value\"", number + 1);
            let (key, value) = line.trim().split_once('=').ok_or_else(wrong)?;
            let value = match value.starts_with('"') {
                // Label values are plain ASCII, so Go's quotes are JSON's.
                true => serde_json::from_str(value).map_err(|_| wrong())?,
                false => value.to_string(),
            };
            (!key.is_empty()).then(|| (key.to_string(), value)).ok_or_else(wrong)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::one_gpu;
    use crate::state::fixtures::no_gpus;

    fn when(text: &str) -> When {
        serde_saphyr::from_str(text).unwrap()
    }

    #[test]
    fn labels_must_be_there_with_their_values() {
        let labels = Labels::from([("pool".into(), "h100".into())]);
        let ask = |text: &str| when(text).unmet(&labels, &no_gpus());
        assert_eq!(ask("{}"), None);
        assert_eq!(ask("labels: {pool: h100}"), None);
        assert_eq!(ask("labels: {pool: l4}").unwrap(), "label pool is \"h100\", not \"l4\"");
        assert_eq!(ask("labels: {zone: a}").unwrap(), "the node has no label zone");
    }

    #[test]
    fn gpus_are_counted_by_memory_and_product() {
        let mut gpu = (*one_gpu()).clone();
        gpu.gpus[0].product = Some("NVIDIA H100 80GB HBM3".into());
        let memory = gpu.gpus[0].memory.unwrap().total_bytes;
        let ask = |text: &str| when(text).unmet(&Labels::new(), &gpu);
        assert_eq!(ask("gpus: {count: 1}"), None);
        assert_eq!(ask(&format!("gpus: {{memory: {memory}B}}")), None);
        assert!(ask(&format!("gpus: {{memory: {}B}}", memory + 1)).unwrap().starts_with("0 GPUs"));
        assert_eq!(ask("gpus: {product: 'nvidia h100*', memory: 80GB}"), None);
        assert!(ask("gpus: {product: 'H100*'}").is_some());
        assert_eq!(ask("gpus: {count: 2}").unwrap(), "1 GPUs are such, 2 are asked for");
        let none = when("gpus: {}").unmet(&Labels::new(), &no_gpus()).unwrap();
        assert_eq!(none, "0 GPUs are such, 1 are asked for (GPUs: disabled)");
    }

    #[test]
    fn labels_are_read_as_the_downward_api_writes_them() {
        let text = "a=\"b\"\nexample.com/zone=\"x \\\"y\\\"\"\n\nplain=c\n";
        let labels = read_labels(text).unwrap();
        assert_eq!(labels["a"], "b");
        assert_eq!(labels["example.com/zone"], "x \"y\"");
        assert_eq!(labels["plain"], "c");
        for bad in ["a", "=b", "a=\"b"] {
            assert_eq!(read_labels(bad).unwrap_err(), "line 1: write key=\"value\"");
        }
    }
}
