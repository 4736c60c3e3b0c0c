//! The document as a page: no script, nothing from elsewhere.

use std::fmt::Write;

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use serde_json::Value;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;\
                     padding:0 1rem}code,pre{font-family:ui-monospace,monospace}\
                     pre{background:#f5f5f5;padding:.7rem;overflow:auto}\
                     summary{cursor:pointer}td{padding:.1rem .8rem .1rem 0;vertical-align:top}\
                     .m{display:inline-block;width:4.5rem;font-weight:600}\
                     @media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}\
                     pre{background:#242424}a{color:#8cf}}";

/// The page, and the headers that keep it so.
pub(crate) fn page() -> ([(HeaderName, HeaderValue); 2], String) {
    let headers = [
        (
            CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        ),
        (
            CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'"),
        ),
    ];
    (headers, html(&super::document()))
}

fn html(document: &Value) -> String {
    let text = |value: &Value| escape(value.as_str().unwrap_or_default());
    let info = &document["info"];
    let mut page = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>\
         <style>{STYLE}</style><h1>{title} {version}</h1><p>{description}\
         <p>For programs: <a href=/openapi.json>openapi.json</a><h2>Operations</h2>",
        title = text(&info["title"]),
        version = text(&info["version"]),
        description = text(&info["description"]),
    );
    for (path, methods) in members(&document["paths"]) {
        for (method, operation) in members(methods) {
            let _ = write!(
                page,
                "<details><summary><span class=m>{}</span><code>{}</code> {}</summary>",
                escape(&method.to_uppercase()),
                escape(path),
                text(&operation["summary"])
            );
            page.push_str("<table>");
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let _ = write!(
                    page,
                    "<tr><td><code>{}</code><td>{}<td>{}",
                    text(&parameter["name"]),
                    text(&parameter["in"]),
                    text(&parameter["description"])
                );
            }
            page.push_str("</table>");
            if !operation["requestBody"].is_null() {
                let _ = write!(page, "<p>Takes {}", content(&operation["requestBody"]));
            }
            for (status, answer) in members(&operation["responses"]) {
                let what = text(&answer["description"]);
                let _ = write!(page, "<p>{}: {what} {}", escape(status), content(answer));
            }
            page.push_str("</details>");
        }
    }
    page.push_str("<h2>Types</h2>");
    for (name, schema) in members(&document["components"]["schemas"]) {
        let name = escape(name);
        let schema = serde_json::to_string_pretty(schema).unwrap_or_default();
        let _ = write!(
            page,
            "<details id=\"{name}\"><summary><code>{name}</code></summary><pre>{}</pre></details>",
            escape(&schema)
        );
    }
    page
}

/// Media types, each with a link to what it holds.
fn content(body: &Value) -> String {
    let mut text = String::new();
    for (kind, media) in members(&body["content"]) {
        let schema = &media["schema"];
        let reference = schema["$ref"].as_str().or(schema["items"]["$ref"].as_str());
        let name = reference.and_then(|reference| reference.rsplit('/').next());
        let _ = write!(text, "<code>{}</code> ", escape(kind));
        if let Some(name) = name.map(escape) {
            let list = if schema["items"].is_null() {
                ""
            } else {
                "list of "
            };
            let _ = write!(text, "{list}<a href=\"#{name}\">{name}</a> ");
        }
    }
    text
}

fn members(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_every_operation_and_loads_nothing() {
        let page = html(&super::super::document());
        for (path, _) in members(&super::super::document()["paths"]) {
            assert!(
                page.contains(&format!("<code>{}</code>", escape(path))),
                "{path}"
            );
        }
        for loads in ["<script", "src=", "@import", "url(", "http://", "https://"] {
            assert!(!page.contains(loads), "{loads}");
        }
    }
}
