//! Who may call over TCP, and what.
//!
//! ```text
//! TLS ─► certificate of the client's CA, where one is asked for
//!     ─► Authenticator: a bearer token, or the certificate is enough ─► Caller ─► reads │ writes
//! ```
//!
//! On the unix socket nobody is asked: who may open it may call.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use carport_image::Digest;
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::config::load::read;

/// Tokens in a file; more are a user database.
const MAX_TOKENS: usize = 1_024;
/// Shorter ones can be guessed.
const MIN_TOKEN_BYTES: usize = 16;

/// Somebody who may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// For logs.
    pub name: String,
    /// Whether it may change the node.
    pub may_write: bool,
}

/// Tells who calls.
pub trait Authenticator: Send + Sync {
    /// Who sends `token`; `None`: nobody that is known. Must not block.
    fn authenticate(&self, token: Option<&str>) -> Option<Caller>;
}

/// Whoever has a certificate of the right CA.
#[derive(Debug)]
pub struct Certificates;

impl Authenticator for Certificates {
    fn authenticate(&self, _token: Option<&str>) -> Option<Caller> {
        Some(Caller { name: "certificate".into(), may_write: true })
    }
}

/// Tokens of a file: `TOKEN NAME read` or `TOKEN NAME write` a line.
pub struct TokenFile {
    path: PathBuf,
    // By the token's hash: how long a look takes says nothing about the tokens.
    callers: RwLock<HashMap<Digest, Caller>>,
}

impl TokenFile {
    /// Reads `path`.
    ///
    /// # Errors
    ///
    /// Names file and line, and never a token.
    pub fn open(path: &Path) -> Result<Self, String> {
        let callers = RwLock::new(tokens(path)?);
        Ok(Self { path: path.to_path_buf(), callers })
    }

    /// Reads the file again; when that fails what it said before holds.
    ///
    /// # Errors
    ///
    /// As [`TokenFile::open`].
    pub fn reload(&self) -> Result<(), String> {
        let callers = tokens(&self.path)?;
        *self.callers.write().unwrap_or_else(PoisonError::into_inner) = callers;
        Ok(())
    }
}

impl Authenticator for TokenFile {
    fn authenticate(&self, token: Option<&str>) -> Option<Caller> {
        let hash = Digest::of(token?.as_bytes());
        self.callers.read().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned()
    }
}

fn tokens(path: &Path) -> Result<HashMap<Digest, Caller>, String> {
    let text = read(path).map_err(|error| error.to_string())?;
    let mut callers = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let place = format!("{}:{}", path.display(), number + 1);
        let words: Vec<&str> = line.split_whitespace().collect();
        let (token, name, may_write) = match words[..] {
            [token, name, "read"] => (token, name, false),
            [token, name, "write"] => (token, name, true),
            _ => return Err(format!("{place}: write a token, a name, and read or write")),
        };
        if token.len() < MIN_TOKEN_BYTES {
            return Err(format!("{place}: a token has at least {MIN_TOKEN_BYTES} characters"));
        }
        let caller = Caller { name: name.to_string(), may_write };
        if callers.insert(Digest::of(token.as_bytes()), caller).is_some() {
            return Err(format!("{place}: this token stands in a line before"));
        }
        if callers.len() > MAX_TOKENS {
            return Err(format!("{place}: write at most {MAX_TOKENS} tokens"));
        }
    }
    Ok(callers)
}

/// What stands before the services of one listener.
#[derive(Clone)]
pub(super) enum Guard {
    /// Everybody may do everything.
    Open,
    /// Who is known may read; who may write may do that where it is allowed at all.
    Known { who: Arc<dyn Authenticator>, writes: bool },
}

/// A guard before a service that reads, or one that writes.
#[derive(Clone)]
pub(super) struct Gate {
    guard: Guard,
    write: bool,
}

impl Guard {
    pub(super) fn reads(&self) -> Gate {
        Gate { guard: self.clone(), write: false }
    }

    pub(super) fn writes(&self) -> Gate {
        Gate { guard: self.clone(), write: true }
    }
}

impl Gate {
    fn check(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let Guard::Known { who, writes } = &self.guard else { return Ok(()) };
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
        });
        let Some(caller) = who.authenticate(token) else {
            return Err(Status::unauthenticated(
                "send a token that the agent knows: authorization: Bearer TOKEN",
            ));
        };
        if !self.write {
            return Ok(());
        }
        if !writes {
            return Err(Status::permission_denied(
                "calls that change the node are not served over TCP here (api.tcp.writes)",
            ));
        }
        if !caller.may_write {
            return Err(Status::permission_denied(format!("{} may read only", caller.name)));
        }
        Ok(())
    }
}

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.check(request.metadata())?;
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn file(text: &str) -> (tempfile::NamedTempFile, Result<TokenFile, String>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let tokens = TokenFile::open(file.path());
        (file, tokens)
    }

    #[test]
    fn a_token_says_who_calls_and_what_they_may_do() {
        let text = "# schedulers\nreader-0123456789 sched read\n\nwriter-0123456789 ops write\n";
        let (path, tokens) = file(text);
        let tokens = Arc::new(tokens.unwrap());
        let code = |guard: &Guard, write: bool, header: &str| {
            let mut metadata = MetadataMap::new();
            if !header.is_empty() {
                metadata.insert("authorization", header.parse().unwrap());
            }
            let gate = if write { guard.writes() } else { guard.reads() };
            gate.check(&metadata).err().map_or(Code::Ok, |status| status.code())
        };
        let guard = |writes| Guard::Known { who: tokens.clone(), writes };
        for (writes, write, header, expected) in [
            (true, false, "Bearer reader-0123456789", Code::Ok),
            (true, false, "bearer writer-0123456789", Code::Ok),
            (true, true, "Bearer writer-0123456789", Code::Ok),
            (true, true, "Bearer reader-0123456789", Code::PermissionDenied),
            (false, true, "Bearer writer-0123456789", Code::PermissionDenied),
            (true, false, "", Code::Unauthenticated),
            (true, false, "Bearer reader-012345678", Code::Unauthenticated),
            (true, true, "Basic writer-0123456789", Code::Unauthenticated),
        ] {
            assert_eq!(code(&guard(writes), write, header), expected, "{writes} {write} {header}");
        }
        assert_eq!(code(&Guard::Open, true, ""), Code::Ok);

        std::fs::write(path.path(), "other-0123456789a sched read\n").unwrap();
        tokens.reload().unwrap();
        assert_eq!(code(&guard(true), false, "Bearer reader-0123456789"), Code::Unauthenticated);
        std::fs::write(path.path(), "nonsense\n").unwrap();
        assert!(tokens.reload().is_err());
        assert_eq!(code(&guard(true), false, "Bearer other-0123456789a"), Code::Ok);
    }

    #[test]
    fn a_bad_line_is_named_and_no_token_is_shown() {
        for (text, part) in [
            ("secret-0123456789 name\n", ":1: write a token, a name, and read or write"),
            ("# a\nshort name read\n", ":2: a token has at least 16 characters"),
            ("secret-0123456789 a read\nsecret-0123456789 b write\n", ":2: this token stands"),
        ] {
            let error = file(text).1.err().unwrap();
            assert!(error.contains(part) && !error.contains("secret"), "{error}");
        }
    }
}
