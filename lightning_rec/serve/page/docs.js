"use strict";

// A short reading of /openapi.json.

const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

function resolved(schema, schemas) {
  return schema && schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema;
}

function kind(schema, schemas) {
  const found = resolved(schema, schemas) || {};
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" | ");
  const parts = found.anyOf || found.oneOf;
  if (parts) return [...new Set(parts.map((part) => kind(part, schemas)))].join(" | ");
  if (found.type === "array") return `[${kind(found.items, schemas)}, …]`;
  return found.title && found.properties ? found.title : found.type || "any";
}

function fields(schema, schemas, seen = new Set()) {
  const found = resolved(schema, schemas) || {};
  const inner = found.oneOf || found.anyOf || (found.items ? [found.items] : []);
  const lines = [];
  if (found.properties && !seen.has(found.title)) {
    seen.add(found.title);
    lines.push(`${found.title}`);
    const required = new Set(found.required || []);
    for (const [name, part] of Object.entries(found.properties)) {
      const told = resolved(part, schemas).description || part.description || "";
      lines.push(`  ${name}${required.has(name) ? "" : "?"}: ${kind(part, schemas)}${told ? `  — ${told}` : ""}`);
    }
    for (const part of Object.values(found.properties)) lines.push(...fields(part, schemas, seen));
  }
  for (const part of inner) lines.push(...fields(part, schemas, seen));
  return lines;
}

async function show() {
  const api = await (await fetch("/openapi.json")).json();
  const schemas = (api.components && api.components.schemas) || {};
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, told] of Object.entries(methods)) {
      const group = (told.tags || ["other"])[0];
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push([method.toUpperCase(), path, told]);
    }
  }
  for (const [group, calls] of groups) {
    document.getElementById("calls").append(make("h2", "", group));
    for (const [method, path, told] of calls) {
      const box = make("details", "call");
      const head = make("summary");
      head.append(make("span", "method", method), make("code", "", path));
      box.append(head, make("p", "", told.description || ""));
      const lines = (told.parameters || []).map((part) => `${part.name} (${part.in})  — ${part.description || ""}`);
      const body = told.requestBody && told.requestBody.content["application/json"].schema;
      if (body) lines.push(...fields(body, schemas));
      if (lines.length) box.append(make("pre", "", lines.join("\n")));
      document.getElementById("calls").append(box);
    }
  }
}

show();
