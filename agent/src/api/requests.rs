//! Calls that are safe to repeat: what an id was answered.
//!
//! A caller whose connection broke does not know whether its call was done. With an id it asks
//! again and gets the answer of the first time. The table is bounded in number and time; it is lost with the
//! agent, and the calls themselves do no harm when they are done twice.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use carport_image::Digest;
use prost::Message;
use tokio::time::Instant;
use tonic::Status;

use super::convert::invalid;

/// An answer is remembered for so long.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// The oldest goes when there are more.
const MAX_REMEMBERED: usize = 4_096;
/// A UUID has 36.
const MAX_ID_BYTES: usize = 128;

/// What was answered lately.
#[derive(Debug, Default)]
pub(super) struct Requests(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    answers: HashMap<String, Answer>,
    order: VecDeque<(String, Instant)>,
}

#[derive(Debug)]
struct Answer {
    /// Of the call's name and the request.
    asked: Digest,
    answer: Vec<u8>,
}

impl Requests {
    /// What `id` was answered when it asked the same; an error when it asked something else.
    pub(super) fn answered<A: Message + Default>(
        &self,
        call: &str,
        id: &str,
        request: &impl Message,
    ) -> Result<Option<A>, Status> {
        if id.len() > MAX_ID_BYTES {
            return Err(invalid("request_id", format!("write at most {MAX_ID_BYTES} bytes")));
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.forget(Instant::now());
        let Some(known) = table.answers.get(id) else { return Ok(None) };
        if known.asked != asked(call, request) {
            return Err(invalid("request_id", "was used for another request; choose a new one"));
        }
        Ok(A::decode(known.answer.as_slice()).ok())
    }

    /// Remembers an answer.
    pub(super) fn remember(
        &self,
        call: &str,
        id: &str,
        request: &impl Message,
        answer: &impl Message,
    ) {
        if id.is_empty() {
            return;
        }
        let answer = Answer { asked: asked(call, request), answer: answer.encode_to_vec() };
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.answers.insert(id.to_string(), answer).is_none() {
            table.order.push_back((id.to_string(), Instant::now()));
        }
    }
}

impl Table {
    fn forget(&mut self, now: Instant) {
        while let Some((id, at)) = self.order.front() {
            if self.order.len() <= MAX_REMEMBERED && now.duration_since(*at) < REMEMBERED {
                return;
            }
            self.answers.remove(id);
            self.order.pop_front();
        }
    }
}

fn asked(call: &str, request: &impl Message) -> Digest {
    let mut bytes = call.as_bytes().to_vec();
    bytes.push(0);
    bytes.extend(request.encode_to_vec());
    Digest::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use carport_proto::carport::v1;

    fn request(owner: &str) -> v1::UnpinRequest {
        v1::UnpinRequest { owner: owner.into(), ..Default::default() }
    }

    #[tokio::test]
    async fn an_id_is_answered_the_same_for_an_hour_and_only_for_the_same_request() {
        let requests = Requests::default();
        let ask = |call: &str, id: &str, owner: &str| {
            requests.answered::<v1::UnpinResponse>(call, id, &request(owner))
        };
        assert!(ask("Unpin", "1", "a").unwrap().is_none());
        let answer = v1::UnpinResponse { removed: true };
        requests.remember("Unpin", "1", &request("a"), &answer);
        requests.remember("Unpin", "", &request("a"), &answer);
        assert_eq!(ask("Unpin", "1", "a").unwrap(), Some(answer));
        assert!(ask("Unpin", "", "a").unwrap().is_none(), "no id, no memory");
        for (call, owner) in [("Unpin", "b"), ("Pin", "a")] {
            assert!(ask(call, "1", owner).unwrap_err().message().starts_with("request_id: "));
        }
        assert!(ask("Unpin", &"x".repeat(MAX_ID_BYTES + 1), "a").is_err());
        requests.0.lock().unwrap().forget(Instant::now() + REMEMBERED);
        assert!(ask("Unpin", "1", "b").unwrap().is_none());
    }

    #[tokio::test]
    async fn the_oldest_answer_goes_when_there_are_too_many() {
        let requests = Requests::default();
        for n in 0..=MAX_REMEMBERED + 1 {
            let id = n.to_string();
            requests.answered::<v1::UnpinResponse>("Unpin", &id, &request("a")).unwrap();
            requests.remember("Unpin", &id, &request("a"), &v1::UnpinResponse::default());
        }
        let known = |id: &str| {
            requests.answered::<v1::UnpinResponse>("Unpin", id, &request("a")).unwrap().is_some()
        };
        assert!(!known("0") && known("2"));
    }
}
