//! The native API as an OpenAPI 3.1 document, made of the same types that travel.
//!
//! What an operation takes and gives is said once, in [`operations`]; names, types, limits and
//! descriptions of fields come from the wire types and their documentation. A test holds the list
//! against the routes, another the document against the one that is committed.

mod operations;
mod page;

pub(crate) use page::page;

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

pub(crate) use operations::operations;

use crate::problem::Problem;

/// One operation of the API.
pub(crate) struct Operation {
    method: &'static str,
    path: &'static str,
    /// One line.
    summary: &'static str,
    /// Name, schema, whether it is mandatory, and what it is.
    query: Vec<(&'static str, Value, bool, &'static str)>,
    request: Option<Content>,
    /// Status, and what comes with it.
    answers: Vec<(u16, Content)>,
}

/// What a body is.
enum Content {
    /// JSON of a wire type.
    Json(fn(&mut SchemaGenerator) -> Value),
    /// Something else, of this media type.
    Other(&'static str),
    /// None.
    Nothing(&'static str),
}

impl Operation {
    fn document(&self, generator: &mut SchemaGenerator) -> Value {
        let mut answers = Map::new();
        for (status, content) in &self.answers {
            let answer = content.document(generator);
            answers.insert(status.to_string(), answer);
        }
        let problem = json!({
            "description": "What is wrong, and what to do",
            "content": { "application/problem+json": { "schema": reference::<Problem>(generator) } },
        });
        for range in ["4XX", "5XX"] {
            answers.insert(range.to_owned(), problem.clone());
        }
        let mut document = json!({
            "operationId": self.id(),
            "summary": self.summary,
            "parameters": self.parameters(),
            "responses": answers,
        });
        if let Some(request) = &self.request {
            document["requestBody"] = request.document(generator);
            document["requestBody"]["required"] = json!(true);
        }
        if matches!(self.path, "/livez" | "/readyz") {
            document["security"] = json!([]);
        }
        document
    }

    /// As `post_sandboxes_id_pause`: unique, and a name in most languages.
    fn id(&self) -> String {
        let words = self.path.split(['/', '{', '}', '.']);
        let words = words.filter(|word| !word.is_empty() && *word != "v1");
        let method = self.method.to_ascii_lowercase();
        std::iter::once(method.as_str())
            .chain(words)
            .collect::<Vec<_>>()
            .join("_")
    }

    fn parameters(&self) -> Vec<Value> {
        let mut parameters = Vec::new();
        for name in self
            .path
            .split('{')
            .skip(1)
            .filter_map(|rest| rest.split('}').next())
        {
            let schema = match name {
                "id" => json!({ "type": "string", "pattern": crate::ids::SANDBOX_ID }),
                "name" => json!({ "type": "string", "pattern": crate::ids::TEMPLATE_NAME }),
                _ => json!({ "type": "integer", "minimum": 1, "maximum": u32::MAX }),
            };
            parameters.push(json!({
                "name": name, "in": "path", "required": true, "schema": schema,
            }));
        }
        for (name, schema, required, description) in &self.query {
            parameters.push(json!({
                "name": name, "in": "query", "required": required, "schema": schema,
                "description": description,
            }));
        }
        parameters
    }
}

impl Content {
    fn document(&self, generator: &mut SchemaGenerator) -> Value {
        match self {
            Self::Json(schema) => json!({
                "description": "Done",
                "content": { "application/json": { "schema": schema(generator) } },
            }),
            Self::Other(kind) => json!({
                "description": "Bytes, as they come",
                "content": { *kind: {} },
            }),
            Self::Nothing(what) => json!({ "description": what }),
        }
    }
}

fn reference<T: schemars::JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

/// The document.
#[must_use]
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for operation in operations() {
        let document = operation.document(&mut generator);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.to_ascii_lowercase()] = document;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Thaw",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "description": "Sandboxes of one host: created, paused to disk, brought back, forked. \
                            Unknown fields and parameters are refused. Answers may gain fields. \
                            The routes of E2B's clients beside these are documented by E2B.",
        },
        "security": [{ "bearer": [] }, { "key": [] }],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "key": { "type": "apiKey", "in": "header", "name": "X-API-Key" },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_names_of_their_own() {
        let mut names: Vec<String> = operations().iter().map(Operation::id).collect();
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all, "{names:?}");
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = document();
        let text = document.to_string();
        let references = text.split("\"$ref\":\"#").skip(1);
        let mut count = 0;
        for reference in references {
            let pointer = reference.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
            count += 1;
        }
        assert!(count > 30, "{count}");
    }
}
