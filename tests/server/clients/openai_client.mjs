// OpenAI's client for node: chat and responses with a tool, streamed, and a structured answer.
// BASE_URL is the server's, API_KEY its key, PACKAGES the folder that holds node_modules. Prints one JSON object.
import { createRequire } from "node:module";

const OpenAI = createRequire(`${process.env.PACKAGES}/package.json`)("openai").default;
const client = new OpenAI({ baseURL: `${process.env.BASE_URL}/v1`, apiKey: process.env.API_KEY, maxRetries: 0 });
const schema = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};

async function chat() {
  const tools = [{ type: "function", function: { name: "get_weather", parameters: schema } }];
  const messages = [{ role: "user", content: "weather?" }];
  const stream = client.chat.completions.stream({ model: "any", messages, tools });
  const { message } = (await stream.finalChatCompletion()).choices[0];
  messages.push(message, { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sunny" });
  return (await client.chat.completions.create({ model: "any", messages, tools })).choices[0].message.content;
}

async function responses() {
  const tools = [{ type: "function", name: "get_weather", parameters: schema, strict: true }];
  const stream = client.responses.stream({ model: "any", input: "weather?", tools });
  const first = await stream.finalResponse();
  const { call_id } = first.output.find((item) => item.type === "function_call");
  const input = [{ type: "function_call_output", call_id, output: "sunny" }];
  const second = await client.responses.create({ model: "any", input, tools, previous_response_id: first.id });
  return second.output_text;
}

async function parsed() {
  const format = { type: "json_schema", name: "place", schema, strict: true };
  const response = await client.responses.create({ model: "any", input: "where?", text: { format } });
  return JSON.parse(response.output_text);
}

console.log(JSON.stringify({ chat: await chat(), responses: await responses(), parsed: await parsed() }));
