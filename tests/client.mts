// A client of OpenAI's package, in strict TypeScript: a tool call and its result, a stream with usage, a schema.
// tests/test_serve_clients.py compiles and runs it, with the server's URL as the argument.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const tools: OpenAI.Chat.Completions.ChatCompletionTool[] = [{ type: "function", function: { name: "calculator",
  parameters: { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] } } }];
const messages: OpenAI.Chat.Completions.ChatCompletionMessageParam[] = [{ role: "user", content: "12 * 30?" }];

const called = (await client.chat.completions.create({ model, messages, tools, max_tokens: 60 })).choices[0];
const call = called.message.tool_calls![0];
console.log(called.finish_reason, call.type === "function" && JSON.parse(call.function.arguments).expression);

messages.push(called.message, { role: "tool", tool_call_id: call.id, content: "360" });
let text = "";
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 60, stream: true,
  stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) console.log(text, chunk.usage.completion_tokens > 3);
}

const schema = { type: "object", properties: { sure: { type: "boolean" } }, required: ["sure"],
  additionalProperties: false };
const json = await client.chat.completions.create({ model, messages: [{ role: "user", content: "hi" }],
  max_tokens: 40, response_format: { type: "json_schema", json_schema: { name: "answer", schema } } });
console.log(typeof JSON.parse(json.choices[0].message.content!).sure);

const refused = await client.chat.completions.create({ model, messages, n: 0 }).catch((error) => error);
console.log(refused instanceof OpenAI.BadRequestError);
