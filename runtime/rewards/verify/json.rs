//! JSON by a schema.

/// A JSON schema that completions are checked by. It loads no other schema, from files or servers.
pub struct Schema(jsonschema::Validator);

impl Schema {
    /// Reads a schema.
    ///
    /// # Errors
    ///
    /// Why the text is no JSON, or no schema.
    pub fn new(text: &str) -> Result<Self, String> {
        let schema = serde_json::from_str(text).map_err(|e| format!("is no JSON: {e}"))?;
        let validator = jsonschema::validator_for(&schema).map_err(|e| format!("is no JSON schema: {e}"))?;
        Ok(Self(validator))
    }

    /// Whether a completion is JSON that the schema allows. A fence of a code block around it is left out.
    pub fn allows(&self, completion: &str) -> bool {
        let text = completion.trim();
        let fenced =
            text.strip_prefix("```json").or_else(|| text.strip_prefix("```")).and_then(|t| t.strip_suffix("```"));
        serde_json::from_str(fenced.unwrap_or(text)).is_ok_and(|value| self.0.is_valid(&value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_schema_allows_is_valid_json_of_its_shape() {
        let schema =
            Schema::new(r#"{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}"#).unwrap();
        for (text, allowed) in [
            (r#"{"n": 3}"#, true),
            ("```json\n{\"n\": 3}\n```", true),
            (r#"{"n": "3"}"#, false),
            (r#"{"m": 3}"#, false),
            (r#"{"n": 3} and more"#, false),
            ("", false),
        ] {
            assert_eq!(schema.allows(text), allowed, "{text}");
        }
        assert!(Schema::new("{").is_err_and(|e| e.contains("is no JSON")));
        assert!(Schema::new(r#"{"type": 5}"#).is_err_and(|e| e.contains("is no JSON schema")));
        let elsewhere = Schema::new(r#"{"$ref": "http://localhost:1/schema"}"#);
        assert!(elsewhere.is_err(), "another schema was loaded");
    }
}
