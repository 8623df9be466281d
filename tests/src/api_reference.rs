//! `docs/api-reference.md`, made of the comments in the .proto files.
//!
//! ```text
//! proto/carport/v1/*.proto ─► protoc ─► descriptors with comments ─► this ─► Markdown
//! ```
//!
//! Services come first, then messages and enums in the order of their files, so that a reader
//! goes from a call to what it takes and gives. `make api-reference` writes the file, and a test compares it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
    FileDescriptorSet, ServiceDescriptorProto,
};

/// The package that is described.
const PACKAGE: &str = "carport.v1";
const HEAD: &str = "\
# API reference

Made from the comments in [`proto/carport/v1`](../proto/proto/carport/v1) by `make api-reference`; a test holds it to
them. [The API](api.md) says how it is used: where it is served, how watching works, errors, TLS.

";

// Numbers of fields in descriptor.proto, which paths to comments are made of.
const SYNTAX: i32 = 12;
const MESSAGE: i32 = 4;
const ENUM: i32 = 5;
const SERVICE: i32 = 6;
const PART: i32 = 2;

/// A field with a number as its value.
#[derive(Debug)]
pub struct Number {
    /// `Message.field`.
    pub name: String,
    /// What its comment says.
    pub comment: String,
}

/// The files of the API, as they were compiled.
///
/// # Panics
///
/// When the descriptors that are built in cannot be read.
pub fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(carport_proto::FILE_DESCRIPTOR_SET);
    let mut files = set.expect("descriptors of the build").file;
    files.retain(|file| file.package() == PACKAGE);
    files
}

/// The whole document.
pub fn markdown(files: &[FileDescriptorProto]) -> String {
    let described: Vec<Described<'_>> = files.iter().map(Described::new).collect();
    let mut text = HEAD.to_owned();
    for file in described.iter().filter(|file| file.file.service.is_empty()) {
        let _ = writeln!(text, "{}\n", file.paragraphs(&[SYNTAX]));
    }
    let roles = roles(files);
    for file in described.iter().filter(|file| !file.file.service.is_empty()) {
        for (index, service) in (0..).zip(&file.file.service) {
            text += &file.service(index, service);
        }
    }
    for file in &described {
        for (index, message) in (0..).zip(&file.file.message_type) {
            text += &file.message(index, message, roles.get(message.name()));
        }
        for (index, names) in (0..).zip(&file.file.enum_type) {
            text += &file.enumeration(index, names);
        }
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// Every field that holds a number.
pub fn numbers(files: &[FileDescriptorProto]) -> Vec<Number> {
    let mut found = Vec::new();
    for file in files {
        let described = Described::new(file);
        for (m, message) in (0..).zip(&file.message_type) {
            for (f, field) in (0..).zip(&message.field) {
                if is_number(field.r#type()) {
                    found.push(Number {
                        name: format!("{}.{}", message.name(), field.name()),
                        comment: described.line(&[MESSAGE, m, PART, f]),
                    });
                }
            }
        }
    }
    found
}

fn is_number(kind: Type) -> bool {
    !matches!(kind, Type::Bool | Type::String | Type::Bytes | Type::Message | Type::Enum)
}

/// What a message is for, where a call says it.
fn roles(files: &[FileDescriptorProto]) -> BTreeMap<&str, String> {
    let mut roles = BTreeMap::new();
    for service in files.iter().flat_map(|file| &file.service) {
        for call in &service.method {
            let link = format!("[`{}`](#{})", call.name(), service.name().to_lowercase());
            roles.insert(short(call.input_type()), format!("What {link} is asked."));
            roles.entry(short(call.output_type())).or_insert(format!("What {link} answers."));
        }
    }
    roles
}

/// `.carport.v1.Node` → `Node`.
fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Names of fields and codes as code, since Markdown makes something else of `_` and `*`.
fn with_code(text: &str) -> String {
    let words = text.split_whitespace().map(|word| {
        if word.contains('`') || !word.contains(['_', '*']) {
            return word.to_owned();
        }
        let name = word.trim_matches(|c: char| !c.is_alphanumeric() && !"_*".contains(c));
        word.replacen(name, &format!("`{name}`"), 1)
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A file with its comments by path.
struct Described<'a> {
    file: &'a FileDescriptorProto,
    comments: BTreeMap<&'a [i32], (String, String)>,
}

impl<'a> Described<'a> {
    fn new(file: &'a FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        let comments = locations.map(|location| {
            let before = location.leading_detached_comments.join("\n\n");
            let own = format!("{}{}", location.leading_comments(), location.trailing_comments());
            (&*location.path, (before, own))
        });
        Self { file, comments: comments.collect() }
    }

    /// A comment as it is in the file, paragraph by paragraph; what stands apart before it included.
    fn paragraphs(&self, path: &[i32]) -> String {
        let Some((before, own)) = self.comments.get(path) else { return String::new() };
        let text = format!("{before}\n\n{own}");
        let lines: Vec<String> = text.lines().map(with_code).collect();
        let paragraphs = lines.split(String::is_empty).filter(|lines| !lines.is_empty());
        paragraphs.map(|lines| lines.join("\n")).collect::<Vec<_>>().join("\n\n")
    }

    /// A comment on one line, for a table.
    fn line(&self, path: &[i32]) -> String {
        let own = self.comments.get(path).map_or("", |(_, own)| own);
        with_code(own).replace('|', "\\|")
    }

    fn service(&self, index: i32, service: &ServiceDescriptorProto) -> String {
        let path = [SERVICE, index];
        let mut text = format!("## {}\n\n{}\n\n", service.name(), self.paragraphs(&path));
        text += "| Call | Takes | Gives | |\n|---|---|---|---|\n";
        for (n, call) in (0..).zip(&service.method) {
            let stream = if call.server_streaming() { "stream of " } else { "" };
            let _ = writeln!(
                text,
                "| `{}` | {} | {stream}{} | {} |",
                call.name(),
                link(call.input_type()),
                link(call.output_type()),
                self.line(&[SERVICE, index, PART, n]),
            );
        }
        text + "\n"
    }

    fn message(&self, index: i32, message: &DescriptorProto, role: Option<&String>) -> String {
        let mut text = format!("### {}\n\n", message.name());
        let own = self.paragraphs(&[MESSAGE, index]);
        for paragraph in [Some(&own), role].into_iter().flatten().filter(|text| !text.is_empty()) {
            let _ = writeln!(text, "{paragraph}\n");
        }
        if message.field.is_empty() {
            return text + "No fields.\n\n";
        }
        text += "| Field | Type | |\n|---|---|---|\n";
        for (n, field) in (0..).zip(&message.field) {
            let choice = match field.oneof_index {
                Some(of) if !field.proto3_optional() => {
                    let name = usize::try_from(of).ok().and_then(|of| message.oneof_decl.get(of));
                    format!("One of `{}`. ", name.map_or("", |oneof| oneof.name()))
                }
                _ => String::new(),
            };
            let _ = writeln!(
                text,
                "| `{}` = {} | {} | {choice}{} |",
                field.name(),
                field.number(),
                kind(field),
                self.line(&[MESSAGE, index, PART, n]),
            );
        }
        text + "\n"
    }

    fn enumeration(&self, index: i32, names: &EnumDescriptorProto) -> String {
        let mut text = format!("### {}\n\n", names.name());
        let own = self.paragraphs(&[ENUM, index]);
        if !own.is_empty() {
            let _ = writeln!(text, "{own}\n");
        }
        text += "| Value | |\n|---|---|\n";
        for (n, value) in (0..).zip(&names.value) {
            let meaning = self.line(&[ENUM, index, PART, n]);
            let _ = writeln!(text, "| `{}` = {} | {meaning} |", value.name(), value.number());
        }
        text + "\n"
    }
}

/// A message or enum of the package leads to its section.
fn link(name: &str) -> String {
    let short = short(name);
    match name.strip_prefix('.').and_then(|name| name.strip_prefix(PACKAGE)) {
        Some(_) => format!("[{short}](#{})", short.to_lowercase()),
        None => short.to_owned(),
    }
}

fn kind(field: &FieldDescriptorProto) -> String {
    let one = match field.r#type() {
        Type::Message | Type::Enum => link(field.type_name()),
        simple => simple.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    match field.label() {
        Label::Repeated => format!("list of {one}"),
        _ if field.proto3_optional() => format!("{one}, may be absent"),
        _ => one,
    }
}
