//! Chat templates as `transformers` renders them.

use rehearsal::lm::{ChatTemplate, Message};
use serde_json::Value;

#[test]
fn well_known_templates_render_as_transformers_does() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("chat_templates.json")).unwrap();
    assert!(cases.len() >= 12);
    for case in cases {
        let text = |key: &str| case[key].as_str().unwrap_or_default();
        let template = ChatTemplate::new(text("template"), text("bos"), text("eos")).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let rendered = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
        match case["expected"].as_str() {
            Some(expected) => assert_eq!(rendered.unwrap(), expected, "{}", case["name"]),
            None => {
                let error = rendered.unwrap_err().to_string();
                assert!(error.contains(text("error")), "{}: {error}", case["name"]);
            }
        }
    }
}

#[test]
fn a_template_that_does_not_compile_says_so() {
    let error = ChatTemplate::new("{% for %}", "", "").err().unwrap().to_string();
    assert!(error.contains("does not compile"), "{error}");
}
