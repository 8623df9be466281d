//! What CRI-O looks like through its socket: a gRPC server that lists images, and "pulls" what it is told that
//! there is.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use carport_proto::cri::v1;
use carport_proto::cri::v1::image_service_server::{ImageService, ImageServiceServer};
use carport_proto::cri::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// A runtime that is none; gone, with its socket, when dropped.
pub struct FakeCri {
    shared: Arc<Shared>,
    socket: PathBuf,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    known: Mutex<Known>,
    go_on: Notify,
}

#[derive(Default)]
struct Known {
    here: Vec<v1::Image>,
    to_be_had: Vec<v1::Image>,
    pulls: Vec<v1::PullImageRequest>,
    refusal: Option<Status>,
    hold: bool,
}

impl FakeCri {
    /// Serves on `socket`.
    ///
    /// # Panics
    ///
    /// When it cannot listen there.
    pub fn start(socket: &Path) -> Self {
        let listener = UnixListenerStream::new(UnixListener::bind(socket).expect("a socket"));
        let shared = Arc::<Shared>::default();
        let server = tonic::transport::Server::builder()
            .add_service(RuntimeServiceServer::from_arc(Arc::clone(&shared)))
            .add_service(ImageServiceServer::from_arc(Arc::clone(&shared)))
            .serve_with_incoming(listener);
        let server = tokio::spawn(async move { server.await.expect("a server") });
        Self { shared, socket: socket.to_owned(), server }
    }

    /// An image that it has.
    pub fn has(&self, image: v1::Image) {
        self.known().here.push(image);
    }

    /// An image that it has none of any more.
    pub fn has_no(&self, tag: &str) {
        self.known().here.retain(|image| !image.repo_tags.iter().any(|own| own == tag));
    }

    /// An image that it gets when it is told to pull one of its names.
    pub fn could_have(&self, image: v1::Image) {
        self.known().to_be_had.push(image);
    }

    /// What it answers to each pull from now on; nothing: as it should.
    pub fn refuses(&self, refusal: Option<Status>) {
        self.known().refusal = refusal;
    }

    /// Pulls do not end from now on, until it is told that they may.
    pub fn holds(&self, hold: bool) {
        self.known().hold = hold;
        self.shared.go_on.notify_waiters();
    }

    /// The pulls that it was asked for.
    pub fn pulls(&self) -> Vec<v1::PullImageRequest> {
        self.known().pulls.clone()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.shared.known()
    }
}

impl Drop for FakeCri {
    fn drop(&mut self) {
        self.server.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl RuntimeService for Shared {
    async fn version(
        &self,
        _: Request<v1::VersionRequest>,
    ) -> Result<Response<v1::VersionResponse>, Status> {
        Ok(Response::new(v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "cri-o".into(),
            runtime_version: "1.31.0".into(),
            runtime_api_version: "v1".into(),
        }))
    }
}

fn is_named(image: &v1::Image, name: &str) -> bool {
    image.repo_tags.iter().chain(&image.repo_digests).any(|own| own == name)
}

fn name(image: Option<v1::ImageSpec>) -> String {
    image.unwrap_or_default().image
}

#[tonic::async_trait]
impl ImageService for Shared {
    async fn list_images(
        &self,
        _: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        Ok(Response::new(v1::ListImagesResponse { images: self.known().here.clone() }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let name = name(request.into_inner().image);
        let image = self.known().here.iter().find(|image| is_named(image, &name)).cloned();
        Ok(Response::new(v1::ImageStatusResponse { image }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let request = request.into_inner();
        self.known().pulls.push(request.clone());
        loop {
            let go_on = self.go_on.notified();
            if !self.known().hold {
                break;
            }
            go_on.await;
        }
        let mut known = self.known();
        if let Some(refusal) = &known.refusal {
            return Err(refusal.clone());
        }
        let name = name(request.image);
        let image = known.to_be_had.iter().find(|image| is_named(image, &name)).cloned();
        let image = image.ok_or_else(|| Status::unknown("manifest unknown"))?;
        let image_ref = image.id.clone();
        known.here.retain(|here| here.id != image.id);
        known.here.push(image);
        Ok(Response::new(v1::PullImageResponse { image_ref }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let name = name(request.into_inner().image);
        self.known().here.retain(|image| !is_named(image, &name));
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        Ok(Response::new(v1::ImageFsInfoResponse::default()))
    }
}
