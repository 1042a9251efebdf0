// Anthropic's client for node: the tool runner, streamed and not, and a structured answer.
// BASE_URL is the server's, API_KEY its key, PACKAGES the folder that holds node_modules. Prints one JSON object.
import { createRequire } from "node:module";

const require = createRequire(`${process.env.PACKAGES}/package.json`);
const Anthropic = require("@anthropic-ai/sdk").default;
const { betaTool } = require("@anthropic-ai/sdk/helpers/beta/json-schema");

const client = new Anthropic({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 });
const schema = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const getWeather = betaTool({
  name: "get_weather",
  description: "Get the weather in a city.",
  inputSchema: schema,
  run: async ({ city }) => `sunny in ${city}`,
});
const asked = {
  model: "any",
  max_tokens: 300,
  messages: [{ role: "user", content: "weather?" }],
};

const textOf = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");

async function whole() {
  return textOf(await client.beta.messages.toolRunner({ ...asked, tools: [getWeather] }));
}

async function streamed() {
  const runner = client.beta.messages.toolRunner({ ...asked, tools: [getWeather], stream: true });
  let text = "";
  for await (const stream of runner) text = textOf(await stream.finalMessage());
  return text;
}

async function structured() {
  const format = { type: "json_schema", schema };
  const message = await client.messages.create({ ...asked, output_config: { format } });
  return JSON.parse(textOf(message));
}

async function models() {
  const [model] = (await client.models.list()).data;
  return (await client.models.retrieve(model.id)).display_name;
}

console.log(
  JSON.stringify({
    whole: await whole(),
    streamed: await streamed(),
    structured: await structured(),
    models: await models(),
  }),
);
