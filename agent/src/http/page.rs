//! The status page: what the node is and does, for eyes.
//!
//! Plain HTML in one string: no script, no asset, nothing that leads elsewhere. All that comes from outside
//! (names of models, pods, files) is escaped; a policy sent with it forbids the browser the rest.

use std::fmt::{Display, Write as _};
use std::time::{Instant, SystemTime};

use carport_image::pull::{PullProgress, PullState};

use crate::gpu::GpuInventory;
use crate::output::{size, span, time};
use crate::placement::eta;
use crate::run::Phase;
use crate::state::{NodeState, in_flight};

/// Rows of one table; a person does not read more, and a browser should not have to.
const MAX_ROWS: usize = 200;
/// How often a browser asks again.
const REFRESH_SECONDS: u32 = 5;

/// Sent with the page: nothing is loaded, nothing is run.
pub(super) const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
                                 form-action 'none'; frame-ancestors 'none'";

const STYLE: &str = "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;\
padding:0 1em;color:#222;background:#fff}h1{font-size:1.4em}h2{font-size:1.1em;margin-top:1.6em}\
table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:600;color:#555}\
th,td{padding:.2em .8em .2em 0;border-bottom:1px solid #e5e5e5;vertical-align:top}\
td.n{text-align:right;white-space:nowrap}.bad{color:#a40000}.dim{color:#777}progress{width:9em}\
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}th{color:#aaa}\
th,td{border-color:#333}.bad{color:#ff8a80}}";

/// The page.
pub(super) fn render(
    node: &str,
    phase: Phase,
    state: &NodeState,
    pulls: &[PullProgress],
) -> String {
    let mut page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8>\
         <meta http-equiv=refresh content={REFRESH_SECONDS}>\
         <meta name=viewport content=\"width=device-width\"><title>{name}: carport</title>\
         <style>{STYLE}</style><h1>{name}</h1>",
        name = Escaped(node)
    );
    summary(&mut page, phase, state);
    pulling(&mut page, state, pulls);
    models(&mut page, state);
    volumes(&mut page, state);
    prepull(&mut page, state);
    gpus(&mut page, &state.gpus.as_of(Instant::now()));
    let _ = write!(
        page,
        "<p class=dim>carport {}, {}, revision {}",
        env!("CARGO_PKG_VERSION"),
        time(SystemTime::now()),
        state.revision.sequence
    );
    page
}

fn summary(page: &mut String, phase: Phase, state: &NodeState) {
    let words = match (phase, state.troubles.is_empty()) {
        (Phase::Starting, _) => "starting",
        (Phase::Draining, _) => "stopping",
        (Phase::Serving, true) => "ready",
        (Phase::Serving, false) => "degraded",
    };
    let usage = &state.usage;
    let _ = write!(
        page,
        "<p id=state>{words}; the store holds {} in {} files, {} are free of {}",
        size(usage.object_bytes),
        usage.objects,
        size(state.room.space.free_bytes),
        size(state.room.space.limit_bytes)
    );
    for trouble in &state.troubles {
        let _ = write!(page, "<p class=bad>{}: {}", trouble.code, Escaped(&trouble.message));
    }
}

fn pulling(page: &mut String, state: &NodeState, pulls: &[PullProgress]) {
    let rows = pulls.iter().map(|pull| {
        let how = match &pull.state {
            PullState::Failed { message, .. } => {
                format!("<span class=bad>{}</span>", Escaped(message))
            }
            _ if pull.total_bytes == 0 => "waiting for the registry".to_string(),
            _ => format!(
                "<progress max={} value={}></progress> {} of {}",
                pull.total_bytes,
                pull.done_bytes.min(pull.total_bytes),
                size(pull.done_bytes),
                size(pull.total_bytes)
            ),
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rate = pull.bytes_per_second.max(0.0) as u64;
        let rate = if in_flight(pull) { format!("{}/s", size(rate)) } else { String::new() };
        let left = eta(pull, pulls, &state.rates).map(|eta| span(eta.p50)).unwrap_or_default();
        let name = Escaped(&pull.reference).to_string();
        [Cell::text(name), Cell::text(how), Cell::number(rate), Cell::number(left)]
    });
    table(page, "pulls", "Pulls", &["Model", "Progress", "Rate", "Left"], rows);
}

fn models(page: &mut String, state: &NodeState) {
    let now = SystemTime::now();
    let rows = state.images.values().map(|image| {
        let names: Vec<String> =
            image.references.iter().map(|name| Escaped(name).to_string()).collect();
        let name = if names.is_empty() { image.digest.to_string() } else { names.join("<br>") };
        let hot = state.page_cache.get(&image.digest).map(|sample| size(sample.bytes));
        [
            Cell::text(name),
            Cell::text(image.digest.short()),
            Cell::number(size(image.unpacked_bytes)),
            Cell::number(hot.unwrap_or_default()),
            Cell::number(state.mounts(&image.digest).to_string()),
            Cell::text(if state.is_pinned(&image.digest, now) { "pinned" } else { "" }.into()),
        ]
    });
    let header = ["Model", "Digest", "Size", "In memory", "Volumes", ""];
    table(page, "models", "Models", &header, rows);
}

fn volumes(page: &mut String, state: &NodeState) {
    let mut volumes: Vec<_> = state.volumes.values().flatten().collect();
    volumes.sort_by_key(|volume| volume.published_at);
    let rows = volumes.into_iter().map(|volume| {
        let pod = volume.pod.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name));
        [
            Cell::text(Escaped(pod.unwrap_or_default()).to_string()),
            Cell::text(Escaped(&volume.image).to_string()),
            Cell::number(size(volume.bytes)),
            Cell::text(time(volume.published_at)),
        ]
    });
    table(page, "volumes", "Volumes", &["Pod", "Model", "Size", "Since"], rows);
}

fn prepull(page: &mut String, state: &NodeState) {
    let rows = state.prepull.entries.iter().map(|entry| {
        [
            Cell::text(Escaped(&entry.name).to_string()),
            Cell::text(entry.target.as_str().to_owned()),
            Cell::text(entry.state.as_str().replace('_', " ")),
            Cell::text(Escaped(&entry.message).to_string()),
        ]
    });
    table(page, "prepull", "Pre-pull list", &["Entry", "Where", "State", ""], rows);
}

fn gpus(page: &mut String, gpus: &GpuInventory) {
    let rows = gpus.gpus.iter().map(|gpu| {
        let memory = gpu
            .memory
            .map(|memory| format!("{} of {}", size(memory.used_bytes), size(memory.total_bytes)));
        let pods: Vec<String> = gpu
            .allocations
            .iter()
            .map(|one| Escaped(format!("{}/{}", one.pod_namespace, one.pod_name)).to_string())
            .collect();
        [
            Cell::number(gpu.index.to_string()),
            Cell::text(Escaped(gpu.product.as_deref().unwrap_or("-")).to_string()),
            Cell::text(gpu.health.state.to_string()),
            Cell::number(memory.unwrap_or_default()),
            Cell::text(pods.join("<br>")),
        ]
    });
    table(page, "gpus", "GPUs", &["", "Product", "Health", "Memory", "Pods"], rows);
    if !gpus.provider.message.is_empty() {
        let _ = write!(page, "<p class=dim>{}", Escaped(&gpus.provider.message));
    }
}

/// What stands in a cell: HTML.
struct Cell {
    html: String,
    number: bool,
}

impl Cell {
    fn text(html: String) -> Self {
        Self { html, number: false }
    }

    fn number(html: String) -> Self {
        Self { html, number: true }
    }
}

fn table<const N: usize>(
    page: &mut String,
    id: &str,
    title: &str,
    header: &[&str; N],
    rows: impl ExactSizeIterator<Item = [Cell; N]>,
) {
    let count = rows.len();
    let _ = write!(page, "<h2>{title} <span class=dim>{count}</span></h2>");
    if count == 0 {
        return;
    }
    let _ = write!(page, "<table id={id}><tr>");
    for name in header {
        let _ = write!(page, "<th>{name}");
    }
    for row in rows.take(MAX_ROWS) {
        page.push_str("<tr>");
        for Cell { html, number } in row {
            let class = if number { " class=n" } else { "" };
            let _ = write!(page, "<td{class}>{html}");
        }
    }
    page.push_str("</table>");
    if count > MAX_ROWS {
        let _ = write!(page, "<p class=dim>and {} more", count - MAX_ROWS);
    }
}

/// Text that cannot be taken for HTML.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for character in self.0.to_string().chars() {
            match character {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::{image, node, pin, pull, volume};

    #[test]
    fn the_page_shows_models_pulls_volumes_and_troubles() {
        let mut state = node(vec![image("r/a:1", 3 << 20)]);
        let digest = image("r/a:1", 1).digest;
        state.volumes.insert(digest, vec![volume(digest)]);
        state.pins.insert(digest, vec![pin(digest, None)]);
        let mut failed = pull("r/c:1", 0, 0);
        failed.state = PullState::Failed { reason: "denied", message: "<b>denied</b>".into() };
        let page = render("node-1", Phase::Serving, &state, &[pull("r/b:1", 25, 100), failed]);
        for part in [
            "<p id=state>ready; the store holds",
            "<td>docker.io/r/a:1<td>",
            "<td class=n>3.0 MiB<td class=n><td class=n>1<td>pinned",
            "<progress max=100 value=25></progress> 25 B of 100 B",
            "<span class=bad>&lt;b&gt;denied&lt;/b&gt;</span>",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
    }

    #[test]
    fn nothing_from_outside_is_taken_for_html() {
        let page = render("<script>alert('\"&')</script>", Phase::Serving, &node(vec![]), &[]);
        assert!(page.contains("&lt;script&gt;alert(&#39;&quot;&amp;&#39;)&lt;/script&gt;"));
        assert!(!page.contains("<script"), "{page}");
    }

    #[test]
    fn thousands_of_models_are_a_page_still() {
        let images = (0..5000).map(|n| image(&format!("r/a:{n}"), 1)).collect();
        let page = render("n", Phase::Serving, &node(images), &[]);
        assert!(page.contains("and 4800 more") && page.len() < 64 << 10, "{}", page.len());
    }
}
