{{- define "pokebridge.labels" -}}
app: {{ .name }}
app.kubernetes.io/name: pokebridge
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "pokebridge.secretName" -}}
{{ .Values.secret.name | default .Release.Name }}
{{- end }}

{{- /* The names of the kinds of instances that there are, with commas. */ -}}
{{- define "pokebridge.names" -}}
{{- .Release.Name -}}
{{- if .Values.processor.enabled -}},{{ .Release.Name }}-processor{{- end -}}
{{- if .Values.coordinator.enabled -}},{{ .Release.Name }}-coordinator{{- end -}}
{{- end }}

{{- /* The number of pods that have, or may get, an address of their own. */ -}}
{{- define "pokebridge.ordinals" -}}
{{ ternary .Values.autoscaling.maxReplicas .Values.gateway.replicas .Values.autoscaling.enabled | int }}
{{- end }}

{{- /* A number as Go writes it may be 6.7e+07, which is no integer to a setting. */ -}}
{{- define "pokebridge.setting" -}}
{{- if and (kindIs "float64" .) (eq . (float64 (int64 .))) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end }}

{{- /* What values can't say by themselves and would only show when pods stop or shards move. */ -}}
{{- define "pokebridge.check" -}}
{{- $v := .Values -}}
{{- if and (eq $v.coordination "static") (or (ne $v.mode "partitioned") $v.autoscaling.enabled $v.coordinator.enabled) -}}
{{- fail "coordination static needs mode partitioned, without autoscaling and without coordinators" -}}
{{- end -}}
{{- if and (eq $v.coordination "store") (not (hasKey $v.secret.keys "coordination")) (or (ne $v.mode "fanout") $v.coordinator.enabled) -}}
{{- fail "coordination store needs secret.keys.coordination: the key of the store's URL in the Secret" -}}
{{- end -}}
{{- if and $v.ingress.enabled (ne $v.mode "fanout") -}}
{{- fail "ingress serves mode fanout only: it has no address for each pod; use gatewayApi" -}}
{{- end -}}
{{- if and (not $v.secret.name) (not $v.secret.data) -}}
{{- fail "secret needs the name of a Secret that exists, or data to make one of" -}}
{{- end -}}
{{- /* Clients that do not answer a close frame have 6 seconds. */ -}}
{{- $stop := addf $v.preStopSeconds ($v.settings.drain_s | default 5) 6 ($v.settings.grace_s | default 10) -}}
{{- if ge $stop (float64 $v.terminationGracePeriodSeconds) -}}
{{- fail (printf "terminationGracePeriodSeconds must be more than %v: preStopSeconds + drain_s + 6 + grace_s" $stop) -}}
{{- end -}}
{{- end }}

{{- /* The environment that all instances share. */ -}}
{{- define "pokebridge.environment" -}}
{{- $root := .root -}}
{{- range $setting, $key := .keys }}
- name: POKEBRIDGE_{{ upper $setting }}
  valueFrom: {secretKeyRef: {name: {{ include "pokebridge.secretName" $root }}, key: {{ $key }}}}
{{- end }}
{{- range $setting, $value := $root.Values.settings }}
{{- if not (kindIs "invalid" $value) }}
- {name: POKEBRIDGE_{{ upper $setting }}, value: {{ include "pokebridge.setting" $value | quote }}}
{{- end }}
{{- end }}
{{- with $root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* The pods of one kind of instance: .name, .resources, and .environment beside the shared one. */ -}}
{{- define "pokebridge.podTemplate" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "pokebridge.labels" . | nindent 4 }}
  annotations:
    {{- toYaml $root.Values.podAnnotations | nindent 4 }}
    {{- with $root.Values.secret.data }}
    checksum/secret: {{ toJson . | sha256sum }}
    {{- end }}
spec:
  # Otherwise a Service called pokebridge puts POKEBRIDGE_PORT=tcp://… into the environment.
  enableServiceLinks: false
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    seccompProfile: {type: RuntimeDefault}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {app: {{ .name }}}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- range $field := list "nodeSelector" "tolerations" "affinity" }}
  {{- with index $root.Values $field }}
  {{ $field }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: pokebridge
      image: {{ printf "%s:%s" $root.Values.image.repository ($root.Values.image.tag | default $root.Chart.AppVersion) }}
      {{- if ne $root.Values.image.pullPolicy "IfNotPresent" }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- end }}
      ports:
        - {name: http, containerPort: 8080}
      env:
        - name: POKEBRIDGE_INSTANCE
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        {{- .environment | nindent 8 }}
        {{- include "pokebridge.environment" . | trim | nindent 8 }}
      # Liveness is not readiness: while the engine is down no instance is ready, and restarting all of them
      # would drop every socket and help nothing.
      livenessProbe:
        httpGet: {path: /healthz, port: http}
        periodSeconds: 10
        timeoutSeconds: 5
      readinessProbe:
        httpGet: {path: /readyz, port: http}
        periodSeconds: 2
        timeoutSeconds: 3
        failureThreshold: 2
      lifecycle:
        preStop:
          sleep: {seconds: {{ $root.Values.preStopSeconds }}}  # until every proxy knows that this pod stops
      resources:
        {{- toYaml .resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
{{- end }}
