//! The checkpoint's chat template: Jinja as `transformers` runs it, without access to anything, with limits on work and
//! output. A template is a program that came with the weights: the limits are on steps and on what it prints, not on
//! the memory of its variables.

use std::{borrow::Cow, collections::BTreeMap, io};

use minijinja::{
    AutoEscape, Environment, Error as JinjaError, ErrorKind, Value, syntax::SyntaxConfig,
};

use crate::python;

/// Steps of the template's virtual machine: a conversation of a thousand turns takes some ten thousand.
const FUEL: u64 = 5_000_000;
/// Longest prompt in bytes.
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat";

/// A compiled chat template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It is not valid Jinja, or uses something that is not there.
    #[error("the chat template does not compile: {0}")]
    Compile(#[source] JinjaError),
    /// The template itself refused the conversation (`raise_exception`).
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    /// It failed, or ran into a limit.
    #[error("the chat template failed: {0}")]
    Render(#[source] JinjaError),
}

impl Template {
    /// Compiles `source`; `variables` are visible to it by name.
    ///
    /// # Errors
    /// When it is not valid.
    pub fn compile(
        source: &str,
        variables: &[(&'static str, String)],
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As transformers sets its environment up.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(TemplateError::Compile)?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::call_method);
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("trim", python::trim);
        environment.add_function("raise_exception", raise_exception);
        for (name, value) in variables {
            environment.add_global(*name, Value::from(value.as_str()));
        }
        environment
            .add_template_owned(NAME, source.to_string())
            .map_err(TemplateError::Compile)?;
        Ok(Self { environment })
    }

    /// Renders messages (role, content) up to where the next answer begins. `thinking` is visible to the template only
    /// if it is set.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] for the user's mistake, [`TemplateError::Render`] for the template's.
    pub fn render<'a>(
        &self,
        messages: impl Iterator<Item = (&'a str, Cow<'a, str>)>,
        thinking: Option<bool>,
    ) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .map(|(role, content)| {
                Value::from(BTreeMap::from([
                    ("role", Value::from(role)),
                    ("content", Value::from(content)),
                ]))
            })
            .collect();
        let mut variables = BTreeMap::from([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
        ]);
        if let Some(thinking) = thinking {
            variables.insert("thinking", Value::from(thinking));
        }
        let mut output = Limited(Vec::new());
        let template = self
            .environment
            .get_template(NAME)
            .expect("compiled under this name");
        template
            .render_captured_to(Value::from(variables), &mut output)
            .map_err(refusal)?;
        Ok(String::from_utf8(output.0).expect("a template writes text"))
    }
}

fn raise_exception(message: &str) -> Result<Value, JinjaError> {
    Err(JinjaError::new(
        ErrorKind::InvalidOperation,
        format!("{REFUSAL}{message}"),
    ))
}

/// Tells the template's own complaints from failures.
const REFUSAL: &str = "raise_exception: ";

fn refusal(error: JinjaError) -> TemplateError {
    match error
        .detail()
        .and_then(|detail| detail.strip_prefix(REFUSAL))
    {
        Some(message) => TemplateError::Refused(message.into()),
        None => TemplateError::Render(error),
    }
}

struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("the prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, content: &str) -> Result<String, TemplateError> {
        let variables = [("bos_token", "<s>".to_string())];
        let messages = [("user", Cow::Borrowed(content))];
        Template::compile(source, &variables)?.render(messages.into_iter(), None)
    }

    #[test]
    fn what_deepseek_s_templates_use_works_as_in_python() {
        for (source, expected) in [
            (
                "{{ bos_token }}{{ messages[0]['content'] }}",
                "<s>a</think>b</think>c",
            ),
            ("{{ messages[0].content.split('</think>')[-1] }}", "c"),
            (
                "{{ messages[0].content.split('</think>', 1)[1] }}",
                "b</think>c",
            ),
            (
                "{% if thinking is not defined %}{% set thinking = false %}{% endif %}{{ thinking }}",
                "False",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            (
                "{% if '</think>' in messages[0].content %}yes{% endif %}",
                "yes",
            ),
            ("{{ messages[0]['tool_calls'] is defined }}", "False"),
            (
                "{{ {'b': [1, 'é<'], 'a': none} | tojson }}",
                r#"{"b": [1, "é<"], "a": null}"#,
            ),
            ("{%- if true %}\n  x\n{%- endif %}\ny", "  xy"),
            (
                "{{ messages[-1].role == 'user' and messages | length == 1 }}",
                "True",
            ),
        ] {
            assert_eq!(
                render(source, "a</think>b</think>c").unwrap(),
                expected,
                "{source}"
            );
        }
    }

    #[test]
    fn a_template_may_refuse_a_conversation() {
        let error = render("{{ raise_exception('roles must alternate') }}", "x").unwrap_err();
        assert!(
            matches!(error, TemplateError::Refused(message) if message == "roles must alternate")
        );
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        for source in [
            "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
            "{% for a in range(100) %}{{ 'x' * 1000000 }}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'x' * 1000000000000 }}",
            "{% include '/etc/passwd' %}",
        ] {
            assert!(render(source, "x").is_err(), "{source}");
        }
    }

    #[test]
    fn markup_in_a_message_is_text() {
        let rendered = render("{{ messages[0].content }}", "{{ 7 * 7 }} <b>&amp;</b>").unwrap();
        assert_eq!(rendered, "{{ 7 * 7 }} <b>&amp;</b>");
    }
}
