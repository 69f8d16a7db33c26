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

#[test]
fn special_tokens_in_prompts_are_tokens_or_text_as_the_configuration_says() {
    let text = rehearsal::embedded::model().unwrap().text;
    let end = text.encode_plain("<|end|>").unwrap();
    assert_eq!(end.len(), 1, "the embedded model's special token");
    let file = tempfile::NamedTempFile::with_suffix(".jsonl").unwrap();
    std::fs::write(file.path(), r#"{"prompt": "Who?<|end|>The dog."}"#).unwrap();
    let count = |special_tokens: bool, chat: bool| {
        let train = Some(file.path().to_path_buf());
        let settings = rehearsal::PromptsSettings { train, chat, special_tokens, ..Default::default() };
        let evaluation = rehearsal::settings::EvaluationSettings { every_steps: 0, ..Default::default() };
        let prompts = rehearsal::data::Prompts::load(&settings, &evaluation, &text, 512).unwrap();
        prompts.train[0].tokens.iter().filter(|token| **token == end[0]).count()
    };
    for chat in [true, false] {
        assert_eq!(count(true, chat), count(false, chat) + 1);
    }
}
