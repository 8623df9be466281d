//! The node's container runtime as the kubelet speaks to it (CRI): who it is, which images it has, and
//! to have one pulled.
//!
//! ```text
//! prepull ──────► Cri ─► the first socket that is there ─► containerd, CRI-O, …
//! inventory ──────┘
//! ```
//!
//! # What always holds
//!
//! - **A guest.** The runtime may be absent, restart or hang: each question has a short time-out. Only a
//!   pull may take long, and ends when the runtime has not answered for a while.
//! - **Texts are the runtime's own**, without the queries of addresses, which may hold secrets, and not long.
//!
//! [`inventory`] keeps what it has, where containerd itself does not tell.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use carport_image::Digest;
use carport_image::source::Credential;
use carport_proto::client;
use carport_proto::cri::v1;
use carport_proto::cri::v1::image_service_client::ImageServiceClient;
use carport_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tonic::transport::Channel;
use tonic::{Code, Status};

pub mod inventory;

/// How long an answer may take. CRI-O reads its store for a list.
const PATIENCE: Duration = Duration::from_secs(10);
/// A list of some thousand images is less.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How much of a runtime's error is worth reading.
const MAX_TOLD: usize = 1_000;

/// A connection to the runtime, made when it is used. Clones share it.
#[derive(Clone)]
pub struct Cri {
    shared: Arc<Shared>,
}

struct Shared {
    /// Where it may be, the likeliest first.
    sockets: Vec<PathBuf>,
    patience: Duration,
    // Held for a look only.
    channel: Mutex<Option<(PathBuf, Channel)>>,
    /// Told of each pull that succeeded.
    pulled: Notify,
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `containerd`, `cri-o`.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// An image that the runtime has, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CriImage {
    /// Names with a tag.
    pub tags: Vec<String>,
    /// Names with a digest, of its manifest or of the index that led to it.
    pub digests: Vec<String>,
    /// As the runtime counts.
    pub bytes: u64,
    /// Whether the kubelet is asked to let it stay.
    pub pinned: bool,
}

impl CriImage {
    /// Whether one of its names is by this digest.
    pub fn is_named_by(&self, digest: &Digest) -> bool {
        let digest = digest.to_string();
        self.digests.iter().any(|name| name.rsplit('@').next() == Some(&*digest))
    }
}

/// Why the runtime did not do as it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CriError {
    /// It does not answer.
    #[error("the container runtime does not answer: {0}")]
    Away(String),
    /// Its disk is full.
    #[error("the container runtime has no room: {0}")]
    NoRoom(String),
    /// It refused, or failed.
    #[error("the container runtime: {0}")]
    Failed(String),
}

impl Cri {
    /// The runtime on the first of `sockets` that is there. Asks nothing yet.
    pub fn new(sockets: Vec<PathBuf>) -> Self {
        Self::patient_for(sockets, PATIENCE)
    }

    /// As [`Cri::new`], for answers that take no longer than `patience`.
    pub fn patient_for(sockets: Vec<PathBuf>, patience: Duration) -> Self {
        let (channel, pulled) = (Mutex::default(), Notify::new());
        Self { shared: Arc::new(Shared { sockets, patience, channel, pulled }) }
    }

    /// How long an answer may take.
    pub fn patience(&self) -> Duration {
        self.shared.patience
    }

    /// Where it is: the first socket that is there, else where it is expected.
    pub fn socket(&self) -> PathBuf {
        let sockets = &self.shared.sockets;
        let there = sockets.iter().find(|socket| socket.exists()).or(sockets.first());
        there.cloned().unwrap_or_default()
    }

    /// Who answers.
    ///
    /// # Errors
    ///
    /// [`CriError`].
    pub async fn identity(&self) -> Result<Identity, CriError> {
        let (socket, channel) = self.channel();
        let mut client = RuntimeServiceClient::new(channel);
        let call = client.version(v1::VersionRequest::default());
        let answer = self.ask(&socket, call).await?;
        Ok(Identity { name: answer.runtime_name, version: answer.runtime_version })
    }

    /// All images.
    ///
    /// # Errors
    ///
    /// [`CriError`].
    pub async fn images(&self) -> Result<Vec<CriImage>, CriError> {
        let (socket, channel) = self.channel();
        let mut client =
            ImageServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let call = client.list_images(v1::ListImagesRequest::default());
        let answer = self.ask(&socket, call).await?;
        Ok(answer.images.into_iter().map(CriImage::from).collect())
    }

    /// The image of this name, where it is complete.
    ///
    /// # Errors
    ///
    /// [`CriError`].
    pub async fn image(&self, name: &str) -> Result<Option<CriImage>, CriError> {
        let (socket, channel) = self.channel();
        let mut client = ImageServiceClient::new(channel);
        let call = client.image_status(v1::ImageStatusRequest { image: spec(name) });
        let answer = self.ask(&socket, call).await?;
        Ok(answer.image.map(CriImage::from))
    }

    /// Has the image of this name pulled and unpacked, as the runtime is configured. Takes as long as that
    /// takes: bounding it is the caller's.
    ///
    /// # Errors
    ///
    /// [`CriError`].
    ///
    /// # Cancel safety
    ///
    /// The runtime stops its pull when it hears of it, and goes on from there the next time.
    pub async fn pull(&self, name: &str, credential: Credential) -> Result<(), CriError> {
        let (socket, channel) = self.channel();
        let mut client = ImageServiceClient::new(channel);
        let request = v1::PullImageRequest { image: spec(name), auth: login(credential) };
        match client.pull_image(request).await {
            Ok(_) => {
                self.shared.pulled.notify_one();
                Ok(())
            }
            Err(status) => Err(refused(&socket, &status).await),
        }
    }

    /// Waits for a pull of ours that succeeds, or has since somebody last waited.
    async fn pulled(&self) {
        self.shared.pulled.notified().await;
    }

    async fn ask<T>(
        &self,
        socket: &Path,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CriError> {
        match tokio::time::timeout(self.shared.patience, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(refused(socket, &status).await),
            Err(_) => {
                let (socket, patience) = (socket.display(), self.shared.patience);
                Err(CriError::Away(format!("{socket}: nothing within {patience:?}")))
            }
        }
    }

    fn channel(&self) -> (PathBuf, Channel) {
        let socket = self.socket();
        let mut kept = self.shared.channel.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((to, channel)) if *to == socket => (socket, channel.clone()),
            _ => {
                let channel = client::dial(&socket);
                *kept = Some((socket.clone(), channel.clone()));
                (socket, channel)
            }
        }
    }
}

impl From<v1::Image> for CriImage {
    fn from(image: v1::Image) -> Self {
        Self {
            tags: image.repo_tags,
            digests: image.repo_digests,
            bytes: image.size,
            pinned: image.pinned,
        }
    }
}

fn spec(name: &str) -> Option<v1::ImageSpec> {
    Some(v1::ImageSpec { image: name.to_owned() })
}

/// Without one the runtime's own configuration holds.
fn login(credential: Credential) -> Option<v1::AuthConfig> {
    let none = v1::AuthConfig::default();
    match credential {
        Credential::Anonymous => None,
        Credential::Password { username, password } => {
            Some(v1::AuthConfig { username, password, ..none })
        }
        Credential::IdentityToken(identity_token) => {
            Some(v1::AuthConfig { identity_token, ..none })
        }
    }
}

/// What a refusal means. The kernel knows best why there is no connection.
async fn refused(socket: &Path, status: &Status) -> CriError {
    let shown = socket.display();
    if let Err(error) = UnixStream::connect(socket).await {
        return CriError::Away(format!("connect to {shown}: {error}"));
    }
    let why = told(status.message());
    match status.code() {
        Code::Unimplemented => CriError::Failed(format!(
            "{shown} does not speak CRI v1 ({why}); enable containerd's CRI plugin, or name another \
             socket in runtime.cri.socket"
        )),
        Code::Unavailable | Code::Cancelled => CriError::Away(format!("{shown}: {why}")),
        _ if why.contains("no space left on device") => CriError::NoRoom(why),
        _ => CriError::Failed(why),
    }
}

/// A runtime's text: on one line, without the queries of addresses, and not long.
fn told(text: &str) -> String {
    let mut told = String::with_capacity(text.len().min(MAX_TOLD));
    let mut in_query = false;
    for character in text.chars() {
        match character {
            '?' if told.rsplit(char::is_whitespace).next().is_some_and(|w| w.contains("://")) => {
                told.push_str("?…");
                in_query = true;
            }
            // What ends an address in an error's text.
            ' ' | '"' | '\n' | '\t' => {
                in_query = false;
                told.push(if character == '"' { '"' } else { ' ' });
            }
            _ if in_query || character.is_control() => {}
            _ => told.push(character),
        }
        if told.len() >= MAX_TOLD {
            told.push('…');
            break;
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_s_text_is_short_and_tells_no_secret() {
        let text = "Get \"https://s3.example/blob?X-Signature=hunter2&b=c\": denied\nwhy?";
        assert_eq!(told(text), "Get \"https://s3.example/blob?…\": denied why?");
        assert!(told(&"é".repeat(5_000)).len() <= MAX_TOLD + 4);
    }

    #[test]
    fn a_login_is_what_the_node_has() {
        let password = Credential::Password { username: "u".into(), password: "p".into() };
        let login_of = login(password).unwrap();
        assert_eq!((&*login_of.username, &*login_of.password), ("u", "p"));
        assert_eq!(login(Credential::IdentityToken("t".into())).unwrap().identity_token, "t");
        assert_eq!(login(Credential::Anonymous), None);
    }

    #[tokio::test]
    async fn without_a_runtime_the_kernel_s_word_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("none.sock");
        let error = Cri::new(vec![socket.clone()]).identity().await.unwrap_err().to_string();
        assert!(error.starts_with("the container runtime does not answer: connect to "), "{error}");
        assert!(error.contains("No such file"), "{error}");
        // The first that is there is asked.
        std::fs::write(folder.path().join("b"), "").unwrap();
        let cri = Cri::new(vec![socket, folder.path().join("b")]);
        assert_eq!(cri.socket(), folder.path().join("b"));
    }
}
