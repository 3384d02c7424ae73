//! The standard service `grpc.health.v1.Health`. What is reached through it serves: before that nothing listens, and when the
//! server stops, connections end.

use super::SERVICE;
use futures_util::stream::{self, Stream, StreamExt};
use tonic::Status;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// "" stands for the server as a whole.
fn status_of(service: &str) -> Option<ServingStatus> {
    ["", SERVICE].contains(&service).then_some(ServingStatus::Serving)
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

/// Says how a service is.
pub(super) async fn check(request: HealthCheckRequest) -> Result<HealthCheckResponse, Status> {
    let unknown = || Status::not_found(format!("there is no service {:?}", request.service));
    status_of(&request.service).map(response).ok_or_else(unknown)
}

/// Says how a service is, and goes on saying so when it changes: until the connection ends it does not.
pub(super) fn watch(request: HealthCheckRequest) -> impl Stream<Item = Result<HealthCheckResponse, Status>> + Send {
    let status = status_of(&request.service).unwrap_or(ServingStatus::ServiceUnknown);
    stream::iter([Ok(response(status))]).chain(stream::pending())
}
