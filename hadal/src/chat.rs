//! `hadal chat`: a conversation in the terminal.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::client::{Client, Error, Model, delta_text};

/// Talk with a model in the terminal
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Ask only this, print the answer and exit
    question: Option<String>,
    /// The server's address
    #[arg(
        long,
        env = "HADAL_URL",
        default_value = "http://127.0.0.1:8000",
        value_name = "URL"
    )]
    url: String,
    /// The server's key
    #[arg(
        long,
        env = "HADAL_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    api_key: Option<String>,
    /// Which model [default: the first that the server offers]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// A system message to begin with
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 always takes the likeliest token [default: the server's]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Tokens of an answer at most [default: as many as fit]
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// Makes answers repeatable
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

const HELP: &str =
    "/reset forgets the conversation, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer.";

/// Talks until the input ends.
///
/// # Errors
/// When the server cannot be reached, or the one question gets no answer.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.url, args.api_key.clone())?;
    let model = client.model(args.model.as_deref()).await?;
    let mut talk = Talk::new(args.system.as_deref());
    if let Some(question) = &args.question {
        let body = request(&args, &model, &talk.with(question));
        return match answer(&client, &body).await? {
            Answer::Whole(_) => Ok(ExitCode::SUCCESS),
            Answer::Stopped(_) => Ok(ExitCode::from(130)),
        };
    }
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("{} at {}. {HELP}", model.id, client.url());
    }
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    loop {
        if interactive {
            eprint!("> ");
        }
        let line = tokio::select! {
            line = lines.next_line() => line?,
            interrupted = tokio::signal::ctrl_c() => { interrupted?; None }
        };
        let Some(line) = line else {
            return Ok(ExitCode::SUCCESS);
        };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(ExitCode::SUCCESS),
            "/reset" => talk = Talk::new(args.system.as_deref()),
            "/help" => eprintln!("{HELP}"),
            question => {
                let body = request(&args, &model, &talk.with(question));
                match answer(&client, &body).await {
                    Ok(Answer::Whole(text) | Answer::Stopped(text)) => talk.add(question, &text),
                    Err(error) => {
                        eprintln!("{error}");
                        if matches!(&error, Error::Refused { status, .. } if *status == 400) {
                            eprintln!("(/reset forgets the conversation, if it grew too long)");
                        }
                    }
                }
            }
        }
    }
}

/// What was said so far.
struct Talk {
    messages: Vec<Value>,
}

impl Talk {
    fn new(system: Option<&str>) -> Self {
        let system = system.map(|text| json!({"role": "system", "content": text}));
        Self {
            messages: system.into_iter().collect(),
        }
    }

    /// The conversation with one more question.
    fn with(&self, question: &str) -> Vec<Value> {
        let mut messages = self.messages.clone();
        messages.push(json!({"role": "user", "content": question}));
        messages
    }

    /// Remembers a question and its answer. A question without one is forgotten.
    fn add(&mut self, question: &str, answer: &str) {
        self.messages = self.with(question);
        self.messages
            .push(json!({"role": "assistant", "content": answer}));
    }
}

fn request(args: &Args, model: &Model, messages: &[Value]) -> Value {
    let mut body = json!({"model": model.id, "messages": messages, "stream": true});
    if let Some(temperature) = args.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(max_tokens) = args.max_tokens {
        body["max_tokens"] = json!(max_tokens);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    body
}

enum Answer {
    Whole(String),
    /// Cut off by Ctrl-C.
    Stopped(String),
}

/// Prints the answer as it comes.
async fn answer(client: &Client, body: &Value) -> Result<Answer, Error> {
    let mut text = String::new();
    let read = async {
        let mut events = client.stream("/v1/chat/completions", body).await?;
        while let Some(chunk) = events.next().await? {
            if let Some(delta) = delta_text(&chunk) {
                text.push_str(delta);
                let mut out = std::io::stdout().lock();
                let printed = out.write_all(delta.as_bytes()).and_then(|()| out.flush());
                printed.map_err(|error| Error::Broken(error.to_string()))?;
            }
        }
        Ok(())
    };
    let whole = tokio::select! {
        read = read => { read?; true }
        _ = tokio::signal::ctrl_c() => false,
    };
    println!();
    Ok(if whole {
        Answer::Whole(text)
    } else {
        Answer::Stopped(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_keeps_its_system_message_and_its_turns_in_order() {
        let mut talk = Talk::new(Some("be brief"));
        talk.add("1+1?", "2");
        let roles: Vec<String> = talk
            .with("and 2+2?")
            .iter()
            .map(|message| message["role"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
    }

    #[test]
    fn a_question_without_an_answer_is_not_remembered() {
        let talk = Talk::new(None);
        assert_eq!(talk.with("lost").len(), 1);
        assert_eq!(talk.with("again").len(), 1);
    }
}
