import { StrictMode } from "react";
import { createRoot } from "react-dom/client";

import { App } from "./App.jsx";

const query = new URLSearchParams(location.search);

createRoot(document.querySelector("#root")).render(
  <StrictMode>
    <App url={query.get("bridge") ?? "http://127.0.0.1:8080"} />
  </StrictMode>,
);
