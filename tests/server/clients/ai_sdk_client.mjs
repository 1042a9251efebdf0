// Vercel's AI SDK through three of its providers: text with a tool loop, streamed and not, and an object.
// BASE_URL is the server's, API_KEY its key, PACKAGES the folder that holds node_modules. Prints one JSON object by provider.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.PACKAGES}/package.json`);
const load = async (name) => import(pathToFileURL(require.resolve(name)));
const { generateText, streamText, generateObject, jsonSchema, stepCountIs, tool } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createAnthropic } = await load("@ai-sdk/anthropic");

const baseURL = `${process.env.BASE_URL}/v1`;
const apiKey = process.env.API_KEY;
const openai = createOpenAI({ baseURL, apiKey });
const providers = {
  chat: openai.chat("any"),
  responses: openai.responses("any"),
  compatible: createOpenAICompatible({ name: "local", baseURL, apiKey, supportsStructuredOutputs: true })("any"),
  anthropic: createAnthropic({ baseURL, apiKey })("any"),
};
const schema = jsonSchema({
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
});
const tools = {
  get_weather: tool({
    description: "Get the weather in a city.",
    inputSchema: schema,
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};

const told = {};
for (const [name, model] of Object.entries(providers)) {
  const asked = { model, maxRetries: 0, prompt: "weather?", tools, stopWhen: stepCountIs(3) };
  const whole = await generateText(asked);
  const streamed = streamText(asked);
  const pieces = [];
  for await (const piece of streamed.textStream) pieces.push(piece);
  const { object } = await generateObject({ model, maxRetries: 0, prompt: "where?", schema });
  told[name] = {
    text: whole.text,
    steps: whole.steps.length,
    reasoning: whole.steps.some((step) => Boolean(step.reasoningText)),
    streamed: pieces.join(""),
    object,
  };
}
console.log(JSON.stringify(told));
