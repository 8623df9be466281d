//! Small model folders, and images made of them.

use std::path::{Path, PathBuf};

use carport_image::pack::{PackError, PackOptions, Packed, pack};
use carport_image::reference::Reference;
use carport_image::source::{PullSecret, RegistryOptions, Sources};
use tempfile::TempDir;

/// A large file's size: enough for a layer of its own and for several chunks.
pub const WEIGHTS_BYTES: usize = 3 * 1024 * 1024 + 17;

/// A folder that looks like a model's.
pub struct Model {
    parent: TempDir,
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

impl Model {
    /// A config, a tokenizer and a file of weights, the same each time.
    ///
    /// # Panics
    ///
    /// When the folder cannot be written.
    pub fn new() -> Self {
        let model = Self { parent: tempfile::tempdir().expect("a temporary folder") };
        std::fs::create_dir(model.path()).expect("a model folder");
        model.write("config.json", br#"{"architectures":["LlamaForCausalLM"]}"#);
        model.write("tokenizer/vocab.json", br#"{"a":0}"#);
        model.write("model.safetensors", &weights());
        model
    }

    /// The model's folder; its name is `tiny-llama`.
    pub fn path(&self) -> PathBuf {
        self.parent.path().join("tiny-llama")
    }

    /// A folder beside it, for a layout.
    pub fn layout(&self) -> PathBuf {
        self.parent.path().join("layout")
    }

    /// Writes a file of the model, and the folders it stands in.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub fn write(&self, name: &str, content: &[u8]) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).expect("a folder");
        std::fs::write(path, content).expect("a model's file");
    }

    /// Packs the model with the default options.
    ///
    /// # Errors
    ///
    /// As [`pack`].
    ///
    /// # Panics
    ///
    /// When `destination` is no reference.
    pub async fn pack(
        &self,
        destination: &str,
        secret: &PullSecret,
        sources: &Sources,
    ) -> Result<Packed, PackError> {
        let destination = reference(destination);
        let options = PackOptions { secret: secret.clone(), ..PackOptions::default() };
        pack(&self.path(), &destination, options, sources).await
    }
}

/// Bytes that neither repeat nor compress.
pub fn weights() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..WEIGHTS_BYTES)
        .map(|_| {
            // xorshift64: the same on every machine.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// The reference that `text` is.
///
/// # Panics
///
/// When it is none.
pub fn reference(text: &str) -> Reference {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

/// Sources that speak plain HTTP with `hosts`, and know no credentials of the machine's.
///
/// # Panics
///
/// When the HTTP client cannot be made.
pub fn sources(hosts: &[&str]) -> Sources {
    Sources::new(options(hosts)).expect("an HTTP client")
}

/// The options that [`sources`] uses, to change one.
pub fn options(hosts: &[&str]) -> RegistryOptions {
    RegistryOptions {
        plain_http: hosts.iter().map(|host| (*host).to_owned()).collect(),
        // Those of whoever runs the tests stay out.
        docker_config: Some(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/no-credentials.json"),
        ),
        ..RegistryOptions::default()
    }
}

/// The text of a `.dockerconfigjson` with one entry.
pub fn docker_config(host: &str, username: &str, password: &str) -> String {
    use base64::Engine;
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    serde_json::json!({ "auths": { host: { "auth": auth } } }).to_string()
}

/// A pull secret for one registry.
///
/// # Panics
///
/// Never: the text is well formed.
pub fn secret(host: &str, username: &str, password: &str) -> PullSecret {
    PullSecret::from_docker_config_json(&docker_config(host, username, password))
        .expect("a docker config")
}
